import colorsys
import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from revnet.data.transforms import _color_distortion
from revnet.data.transforms._color_distortion import make_color_distortion
from revnet.data.transforms._hsv import hsv_to_rgb, rgb_to_hsv
from tests.data.samples import random_images


def set_draws(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """Fix the draws of brightness, contrast, saturation, hue and order, each in 0..1."""
    monkeypatch.setattr(_color_distortion, "uniform", lambda keys, *_: torch.tensor(values).expand(len(keys), 5))


def stretch(pixels: np.ndarray, contrast: float) -> np.ndarray:
    mean = pixels.mean((1, 2), keepdims=True)
    return mean + contrast * (pixels - mean)


def turn(pixels: np.ndarray, saturation: float, hue: float) -> np.ndarray:
    """Adjust saturation and hue pixel by pixel, with the conversions of the standard library."""
    result = np.empty_like(pixels)
    for index in np.ndindex(pixels.shape[1:]):
        h, s, v = colorsys.rgb_to_hsv(*pixels[:, *index].clip(0, 1))
        result[:, *index] = colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v)
    return result


def to_uint8(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy((pixels.clip(0, 1) * 255).round().astype(np.uint8))


@pytest.mark.parametrize("is_contrast_first", [True, False])
@pytest.mark.parametrize(
    ("brightness", "contrast", "saturation", "hue"),
    [(0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0), (0.3, 0.8, 0.2, 0.9), (0.9, 0.1, 0.9, 0.4)],
)
def test_every_step(
    is_contrast_first: bool,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    image = random_images(1, height=8, width=9)
    factors = {"contrast": 0.5 + contrast, "saturation": 0.5 + saturation, "hue": -0.2 + 0.4 * hue}
    pixels = image[0].numpy() / 255 + (2 * brightness - 1) * 32 / 255
    if is_contrast_first:
        pixels = turn(stretch(pixels, factors["contrast"]), factors["saturation"], factors["hue"])
    else:
        pixels = stretch(turn(pixels, factors["saturation"], factors["hue"]), factors["contrast"])
    set_draws(monkeypatch, brightness, contrast, saturation, hue, 0.0 if is_contrast_first else 0.9)
    output = make_color_distortion()(image)[0]
    # Where float32 and float64 differ, rounding may reach the next gray level.
    assert (output.int() - to_uint8(pixels).int()).abs().max() <= 1


def test_neutral_draws_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    set_draws(monkeypatch, 0.5, 0.5, 0.5, 0.5, 0.0)
    images = random_images(4, height=16, width=16)
    images[0] = 0
    images[1] = 255
    assert torch.equal(make_color_distortion()(images), images)


def test_gray_stays_gray() -> None:
    images = random_images(20, channels=1, height=8, width=8).expand(-1, 3, -1, -1)
    output = make_color_distortion()(images)
    assert (output - output[:, :1]).eq(0).all()
    assert not torch.equal(output, images)


def test_each_image_has_its_own_draws() -> None:
    images = random_images(1, height=8, width=8).expand(30, -1, -1, -1)
    output = make_color_distortion()(images)
    assert output.dtype == torch.uint8
    assert output.shape == images.shape
    assert len(output.flatten(1).unique(dim=0)) == 30


def test_draws_follow_the_seed() -> None:
    distort, images = make_color_distortion(), random_images(10)
    before = images.clone()
    torch.manual_seed(3)
    first, second = distort(images), distort(images)
    torch.manual_seed(3)
    assert torch.equal(make_color_distortion()(images), first)
    assert not torch.equal(first, second)
    assert torch.equal(images, before)


def test_draws_are_a_function_of_the_key() -> None:
    distort, images, keys = make_color_distortion(), random_images(10), torch.arange(10)
    output = distort(images, keys)
    assert torch.equal(distort(images[4:7], keys[4:7]), output[4:7])
    assert not torch.equal(distort(images, keys + 10), output)


def test_evaluation_mode_returns_the_batch_unchanged() -> None:
    images = random_images(4)
    assert make_color_distortion().eval()(images) is images


def test_has_no_state_and_can_be_copied() -> None:
    distort = make_color_distortion()
    distort(random_images(2))
    assert distort.state_dict() == {}
    assert list(distort.parameters()) == []
    for copied in (copy.deepcopy(distort), pickle.loads(pickle.dumps(distort))):
        assert copied(random_images(2)).shape == (2, 3, 5, 4)


def test_single_pixels_and_single_images() -> None:
    assert make_color_distortion()(random_images(1, height=1, width=1)).shape == (1, 3, 1, 1)


@pytest.mark.gpu
def test_gpu_batches_use_the_same_draws() -> None:
    distort, images = make_color_distortion(), random_images(10)
    torch.manual_seed(3)
    expected = distort(images)
    torch.manual_seed(3)
    # As above, rounding may reach the next gray level.
    assert (distort(images.cuda()).cpu().int() - expected.int()).abs().max() <= 1


def test_rejects_bad_batches() -> None:
    distort = make_color_distortion()
    with pytest.raises(TypeError, match=r"`images` \(=torch.float32\) must be uint8 pixels; distort them before `Prep"):
        distort(torch.zeros(1, 3, 2, 2))
    for shape in ((2, 1, 4, 4), (3, 4, 4)):
        with pytest.raises(
            ValueError, match=r"`images` \(of shape .*\) must be RGB, \(B, 3, H, W\); leave out the dist"
        ):
            distort(torch.zeros(shape, dtype=torch.uint8))


def test_conversions_equal_the_standard_library() -> None:
    levels = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0], dtype=torch.float64)
    pixels = torch.cartesian_prod(levels, levels, levels)  # corners, edges and grays among them
    hsv = [part.flatten() for part in rgb_to_hsv(pixels[:, :, None, None])]
    expected = torch.tensor([colorsys.rgb_to_hsv(*pixel) for pixel in pixels.tolist()], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(hsv, 1), expected, atol=1e-12, rtol=0)
    rgb = hsv_to_rgb(*(part[:, None, None, None] for part in hsv)).flatten(1)
    torch.testing.assert_close(rgb, pixels, atol=1e-12, rtol=0)


@pytest.mark.parametrize("turns", [-1.2, -0.3, 0.0, 0.7, 1.0, 2.4])
def test_hue_is_periodic(turns: float) -> None:
    hue, saturation, value = rgb_to_hsv(torch.rand(5, 3, 2, 2, dtype=torch.float64))
    expected = hsv_to_rgb((hue + turns) % 1, saturation, value)
    torch.testing.assert_close(hsv_to_rgb(hue + turns, saturation, value), expected, atol=1e-12, rtol=0)
