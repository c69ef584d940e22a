from collections import Counter

import pytest
import torch
from torch import Tensor

from revnet.data.transforms._cutout import Cutout

H, W = 5, 7


def masks(side: int) -> list[Tensor]:
    """Return all possible masks, made with slices: a square around each pixel, cut off at the border."""
    result = []
    for row in range(H):
        for column in range(W):
            top, left = row - side // 2, column - side // 2
            mask = torch.zeros(H, W, dtype=torch.bool)
            mask[max(top, 0) : top + side, max(left, 0) : left + side] = True
            result.append(mask)
    return result


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_squares_are_drawn_uniformly(side: int) -> None:
    torch.manual_seed(0)
    num_images = 100 * H * W
    output = Cutout(side)(torch.ones(num_images, 2, H, W), torch.rand(num_images, 2))
    drawn = Counter(tuple((image == 0).all(0).flatten().tolist()) for image in output)
    assert torch.equal((output == 0).all(1), (output == 0).any(1))  # the same square in every channel
    expected = Counter(tuple(mask.flatten().tolist()) for mask in masks(side))
    assert drawn.keys() == expected.keys()
    for mask, multiplicity in expected.items():
        assert abs(drawn[mask] - 100 * multiplicity) < 60  # six standard deviations; the seed is fixed


def test_pixels_around_the_square_are_kept() -> None:
    images = torch.randn(8, 3, H, W)
    before = images.clone()
    output = Cutout(3)(images, torch.rand(8, 2))
    assert torch.equal(output.where(output != 0, before), before)
    assert torch.equal(images, before)


def test_squares_are_a_function_of_the_draws() -> None:
    images, draws = torch.ones(50, 1, H, W), torch.rand(50, 2)
    assert torch.equal(Cutout(2)(images[10:20], draws[10:20]), Cutout(2)(images, draws)[10:20])
    assert not torch.equal(Cutout(2)(images, draws.flip(0)), Cutout(2)(images, draws))


def test_keeps_the_dtype() -> None:
    assert Cutout(2)(torch.ones(2, 3, H, W, dtype=torch.bfloat16), torch.rand(2, 2)).dtype == torch.bfloat16
