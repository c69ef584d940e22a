import math

import pytest

from revnet.data.decoding.crop import CenterCrop, RandomResizedCrop
from revnet.data.decoding.image_draw import Draw

SIZES = [(1, 1), (1, 1000), (1000, 1), (3, 2), (375, 500), (4000, 3000)]


def draws(count: int) -> list[Draw]:
    return [Draw(3, epoch, image) for epoch in range(4) for image in range(count // 4)]


def test_random_numbers_depend_on_seed_epoch_and_image() -> None:
    keys = [Draw(0, 0, 0), Draw(1, 0, 0), Draw(0, 1, 0), Draw(0, 0, 1), Draw(-1, 0, 0), Draw(0, 0, 2**32 - 1)]
    assert Draw(0, 0, 0).generator().random() == Draw(0, 0, 0).generator().random()
    numbers = [number for key in keys for number in key.generator().random(100)]
    assert len(set(numbers)) == 100 * len(keys)  # the streams do not overlap


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_random_crop_lies_inside(width: int, height: int) -> None:
    for draw in draws(100):
        left, top, right, bottom = RandomResizedCrop().box(width, height, (224, 224), draw)
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height


def test_area_and_aspect_follow_their_distributions() -> None:
    areas, aspects = [], []
    for draw in draws(4000):
        left, top, right, bottom = RandomResizedCrop((0.1, 0.5)).box(1000, 1000, (224, 224), draw)
        areas.append((right - left) * (bottom - top) / 1e6)
        aspects.append(math.log((right - left) / (bottom - top)))
    assert 0.099 < min(areas) < 0.11
    assert 0.49 < max(areas) < 0.501
    # Standard errors are 0.002 and 0.003; the seed is fixed.
    assert sum(areas) / len(areas) == pytest.approx(0.3, abs=0.01)
    assert sum(aspects) / len(aspects) == pytest.approx(0, abs=0.02)
    assert max(aspects) == pytest.approx(math.log(4 / 3), abs=0.01)
    assert min(aspects) == pytest.approx(math.log(3 / 4), abs=0.01)


def test_every_position_is_drawn() -> None:
    boxes = {RandomResizedCrop((0.5, 0.5)).box(6, 6, (2, 2), draw) for draw in draws(2000)}
    assert {left for left, _, right, _ in boxes if right - left == 4} == {0, 1, 2}
    assert {top for _, top, _, bottom in boxes if bottom - top == 4} == {0, 1, 2}


def test_falls_back_to_the_largest_centered_part() -> None:
    assert RandomResizedCrop().box(1, 1000, (224, 224), Draw(0, 0, 0)) == pytest.approx(
        (0, 500 - 2 / 3, 1, 500 + 2 / 3)
    )
    assert RandomResizedCrop((1, 1)).box(300, 100, (224, 224), Draw(0, 0, 0)) == pytest.approx(
        (250 / 3, 0, 650 / 3, 100)
    )


def test_center_crop_of_the_usual_sizes() -> None:
    # The shorter side is resized to 256, and 224 remain.
    assert CenterCrop().box(256, 256, (224, 224), Draw(0, 0, 0)) == (16, 16, 240, 240)
    assert CenterCrop().box(512, 1024, (224, 224), Draw(0, 0, 0)) == (32, 288, 480, 736)
    assert CenterCrop(1.0).box(10, 20, (5, 5), Draw(0, 0, 0)) == (0, 5, 10, 15)
    assert CenterCrop(1.0).box(10, 20, (20, 10), Draw(0, 0, 0)) == (0, 0, 10, 20)
    assert CenterCrop(1.0).box(20, 20, (20, 10), Draw(0, 0, 0)) == (5, 0, 15, 20)


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("fraction", [0.875, 1.0, 0.01])
def test_center_crop_lies_inside(width: int, height: int, fraction: float) -> None:
    left, top, right, bottom = CenterCrop(fraction).box(width, height, (7, 7), Draw(0, 0, 0))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert right - left == pytest.approx(bottom - top)


@pytest.mark.parametrize("area", [(0, 1), (0.5, 0.4), (0.5, 1.1), (-1, 1), (float("nan"), 1), (1,), 0.5, None, "ab"])
def test_rejects_bad_areas(area: object) -> None:
    with pytest.raises(ValueError, match=r"`crop_area` \(=.*\) must be two shares of the image .* pass \(0.08, 1.0\)"):
        RandomResizedCrop(area)


@pytest.mark.parametrize("fraction", [0, -1, 1.01, float("nan")])
def test_rejects_bad_fractions(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"`crop_fraction` \(=.*\) must be above 0 and at most 1"):
        CenterCrop(fraction)
