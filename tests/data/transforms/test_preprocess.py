from pathlib import Path

import pytest
import torch
from torch import Tensor

from revnet.data import Preprocess, make_preprocess
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.data.splits.image_split import ImageSplit
from revnet.errors import DataError
from tests.data.samples import random_images


def make_split(num_images: int, seed: int) -> ImageSplit:
    return ImageSplit(random_images(num_images, seed=seed), torch.zeros(num_images, dtype=torch.int64))


@pytest.fixture
def splits() -> tuple[ImageSplit, ImageSplit]:
    return make_split(2500, seed=0), make_split(300, seed=1)


def test_standardize(splits: tuple[ImageSplit, ImageSplit]) -> None:
    train, test = splits
    pixels = train.images.double() / 255
    mean, deviation = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), correction=0, keepdim=True)
    output = make_preprocess("standardize", train, test)(test.images)
    assert output.dtype == torch.float32
    # A few float32 roundings of values near 1.
    torch.testing.assert_close(output, ((test.images / 255 - mean) / deviation).float(), atol=1e-6, rtol=1e-6)


def test_standardize_ignores_the_test_images(splits: tuple[ImageSplit, ImageSplit]) -> None:
    train, test = splits
    first, second = (make_preprocess("standardize", train, part) for part in (test, train))
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.scale, second.scale)


def test_mean_image(splits: tuple[ImageSplit, ImageSplit]) -> None:
    train, test = splits
    mean = torch.cat([train.images, test.images]).double().mean(0)
    output = make_preprocess("mean_image", train, test)(test.images)
    assert output.dtype == torch.float32
    # Half a unit in the last place of a mean below 255, and one of the difference.
    torch.testing.assert_close(output, (test.images - mean).float(), atol=3e-5, rtol=0)


class OnDisk(AbstractSplit):
    """A split without images, so that reading them fails."""

    labels = None
    image_shape = (3, 224, 224)

    def __len__(self) -> int:
        return 10**6

    def holdout(self, fraction: float, seed: int) -> tuple[AbstractSplit, AbstractSplit]:
        raise NotImplementedError


def test_unit_range() -> None:
    gray = ImageSplit(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16), torch.zeros(1, dtype=torch.int64))
    output = make_preprocess("unit_range", gray, gray)(gray.images).flatten()
    assert output[[0, 255]].tolist() == [-1, 1]
    torch.testing.assert_close(output, torch.linspace(-1, 1, 256), atol=1e-6, rtol=0)
    assert make_preprocess("unit_range", OnDisk(), OnDisk())(random_images(2)).shape == (2, 3, 5, 4)


def test_imagenet() -> None:
    images = random_images(2)
    mean, deviation = ([[[x]] for x in values] for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = (images.double() / 255 - torch.tensor(mean).double()) / torch.tensor(deviation).double()
    output = make_preprocess("imagenet", OnDisk(), OnDisk())(images)
    # A few float32 roundings of values near 1.
    torch.testing.assert_close(output, expected.float(), atol=1e-6, rtol=1e-6)


def test_imagenet_requires_rgb() -> None:
    gray = ImageSplit(random_images(2, channels=1), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`kind` \(='imagenet'\) is for RGB images, .* 1 channel; pass 'unit_range'"):
        make_preprocess("imagenet", gray, gray)


@pytest.mark.parametrize("kind", ["standardize", "mean_image"])
def test_statistics_need_images_in_memory(kind: str) -> None:
    message = rf"`kind` \(='{kind}'\) needs all images of `train` in memory, .*; pass 'imagenet' or 'unit_range'\.$"
    with pytest.raises(ValueError, match=message):
        make_preprocess(kind, OnDisk(), OnDisk())


def test_mean_image_also_needs_the_test_images_in_memory() -> None:
    with pytest.raises(ValueError, match="needs all images of `test` in memory"):
        make_preprocess("mean_image", make_split(4, seed=0), OnDisk())


def test_statistics_are_exact() -> None:
    # Sums of more than 2^24 in float32 would lose whole gray levels.
    images = torch.full((1000, 1, 150, 150), 254, dtype=torch.uint8)
    images[:, :, ::2] = 255
    split = ImageSplit(images, torch.zeros(1000, dtype=torch.int64))
    standardize = make_preprocess("standardize", split, split)
    assert standardize.mean.item() == 254.5
    assert standardize.scale.item() == 0.5
    assert make_preprocess("mean_image", split, split).mean.unique().tolist() == [254.0, 255.0]


@pytest.mark.parametrize("kind", ["standardize", "mean_image"])
def test_rebuilt_from_its_tensors(splits: tuple[ImageSplit, ImageSplit], kind: str, tmp_path: Path) -> None:
    original = make_preprocess(kind, *splits)
    torch.save(original.state_dict(), tmp_path / "preprocess.pt")
    rebuilt = Preprocess(**torch.load(tmp_path / "preprocess.pt"))
    images = splits[1].images
    assert torch.equal(rebuilt(images), original(images))
    assert list(original.state_dict()) == ["mean", "scale"]


def test_keeps_its_own_copy_of_the_statistics() -> None:
    mean = torch.zeros(3, 1, 1)
    preprocess = Preprocess(mean, torch.ones(3, 1, 1))
    mean += 1
    assert preprocess.mean.sum() == 0


def test_statistics_are_buffers_of_the_module() -> None:
    preprocess = Preprocess(torch.zeros(3, 1, 1), torch.ones(3, 1, 1)).double()
    assert preprocess(random_images(2)).dtype == torch.float64
    assert list(preprocess.parameters()) == []
    assert repr(preprocess) == "Preprocess(shape=(3, 1, 1))"


def test_unknown_kind(splits: tuple[ImageSplit, ImageSplit]) -> None:
    with pytest.raises(ValueError, match=r"`kind` \(='standardise'\) must be one of .*; did you mean 'standardize'\?"):
        make_preprocess("standardise", *splits)
    with pytest.raises(ValueError, match=r"`kind` \(='zca'\) must be one of standardize, .*, unit_range\.$"):
        make_preprocess("zca", *splits)


def test_constant_channel() -> None:
    images = random_images(4)
    images[:, 1] = 7
    split = ImageSplit(images, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError, match="channel 1 has the same value in every training pixel"):
        make_preprocess("standardize", split, split)
    assert make_preprocess("mean_image", split, split)(images)[:, 1].eq(0).all()


def test_mean_image_of_two_data_sets() -> None:
    other = ImageSplit(random_images(4, height=6), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(
        ValueError, match=r"`test` \(with images \(3, 6, 4\)\) must have images of the shape of `train`"
    ):
        make_preprocess("mean_image", make_split(4, seed=0), other)


@pytest.mark.parametrize(
    ("mean", "scale", "name"),
    [
        (torch.zeros(3), torch.ones(3), "mean"),
        (torch.zeros(3, 1, 1, dtype=torch.int64), torch.ones(3, 1, 1), "mean"),
        (torch.full((3, 1, 1), float("nan")), torch.ones(3, 1, 1), "mean"),
        (torch.zeros(3, 1, 1), torch.ones(1, 1, 1), "scale"),
        (torch.zeros(3, 1, 1), torch.zeros(3, 1, 1), "scale"),
        (torch.zeros(3, 1, 1), torch.full((3, 1, 1), float("inf")), "scale"),
        (torch.zeros(3, 1, 1), torch.ones(3, 1, 1).double(), "scale"),
    ],
)
def test_rejects_bad_statistics(mean: Tensor, scale: Tensor, name: str) -> None:
    with pytest.raises(ValueError, match=rf"^`{name}` \(of shape .*\) must be .*finite"):
        Preprocess(mean, scale)


def test_rejects_floats() -> None:
    with pytest.raises(TypeError, match=r"`images` \(=torch.float32\) must be uint8 pixels"):
        Preprocess(torch.zeros(3, 1, 1), torch.ones(3, 1, 1))(torch.zeros(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("statistics", "images"),
    [((3, 1, 1), (2, 1, 4, 4)), ((1, 1, 1), (2, 3, 4, 4)), ((3, 8, 8), (2, 3, 1, 8)), ((3, 1, 1), (3, 4, 4))],
    ids=["gray instead of color", "color instead of gray", "size", "no batch"],
)
def test_rejects_images_of_another_data_set(statistics: tuple[int, ...], images: tuple[int, ...]) -> None:
    preprocess = Preprocess(torch.zeros(statistics), torch.ones(statistics))
    with pytest.raises(ValueError, match="must have the channels and the size of the statistics"):
        preprocess(torch.zeros(images, dtype=torch.uint8))
