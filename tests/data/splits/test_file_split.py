from pathlib import Path

import pytest
import torch

from revnet.data.decoding.crop import CenterCrop, RandomResizedCrop
from revnet.data.decoding.image_draw import Draw
from revnet.data.splits.file_split import FileSplit
from revnet.errors import DataError
from tests.data.samples import flat_image, write_image


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Return five images, each with its own gray level."""
    files = [tmp_path / f"{number}.png" for number in range(5)]
    for number, file in enumerate(files):
        write_image(file, flat_image(50 * number))
    return files


def make_split(files: list[Path], **options: object) -> FileSplit:
    return FileSplit(files, torch.arange(len(files)), **{"image_size": 8, "crop": RandomResizedCrop()} | options)


def test_a_batch_is_decoded_in_order(files: list[Path]) -> None:
    batch = make_split(files).__getitems__([Draw(0, 0, 3), Draw(0, 0, 1)])
    assert batch.images.shape == (2, 3, 8, 8)
    assert batch.images.dtype == torch.uint8
    assert batch.images[:, 0, 0, 0].tolist() == [150, 50]
    assert batch.labels.tolist() == [3, 1]
    assert batch.corrupt == ()


def test_single_images(files: list[Path]) -> None:
    split = make_split(files)
    image, label = split[-1]
    assert image[0, 0, 0] == 200
    assert label == 4
    assert [int(label) for _, label in split] == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        split[5]


def test_crops_depend_on_the_draw_alone(tmp_path: Path) -> None:
    write_image(tmp_path / "x.png")
    split = FileSplit(
        [tmp_path / "x.png"] * 2, torch.zeros(2, dtype=torch.int64), image_size=8, crop=RandomResizedCrop()
    )
    draws = [Draw(0, 0, 0), Draw(0, 0, 1), Draw(0, 1, 0), Draw(1, 0, 0)]
    images = split.__getitems__(draws).images
    assert len(images.unique(dim=0)) == 4
    assert torch.equal(split.__getitems__(draws[::-1]).images, images.flip(0))
    still = FileSplit([tmp_path / "x.png"] * 2, split.labels, image_size=8, crop=CenterCrop())
    assert len(still.__getitems__(draws).images.unique(dim=0)) == 1


def test_undecodable_images_are_reported_with_their_batch(files: list[Path]) -> None:
    files[1].write_bytes(b"")
    files[4].write_text("text")
    batch = make_split(files).__getitems__([Draw(0, 0, index) for index in range(5)])
    assert batch.labels.tolist() == [0, 2, 3]
    assert batch.images[:, 0, 0, 0].tolist() == [0, 100, 150]
    assert batch.corrupt == ((f"'{files[1]}'", "it is empty"), (f"'{files[4]}'", "it is not an image"))
    message = rf"^'{files[1]}' cannot be decoded: it is empty; restore it, or set `on_corrupt` to 'skip' to leave such"
    with pytest.raises(DataError, match=message):
        make_split(files)[1]


def test_repr_has_no_file_names(files: list[Path]) -> None:
    assert repr(make_split(files, crop=CenterCrop())) == (
        "FileSplit(5 files, image_size=8, crop=CenterCrop(fraction=0.875))"
    )


def test_rejects_bad_arguments(files: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"`files` \(=\[\]\) must not be empty"):
        make_split([])
    for labels in (torch.zeros(5), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(
            ValueError, match=r"`labels` \(of shape .*\) must be int64 of shape \(5,\), one label per file"
        ):
            FileSplit(files, labels, image_size=8, crop=RandomResizedCrop())
    with pytest.raises(ValueError, match=r"`image_size` \(=-1\) must be positive"):
        make_split(files, image_size=-1)
    for size in ((8, 8), 8.0, True):
        with pytest.raises(TypeError, match=r"`image_size` \(=.*\) must be one integer, the side of a square"):
            make_split(files, image_size=size)
    with pytest.raises(ValueError, match=r"`on_corrupt` \(='Skip'\) must be one of stop, skip"):
        make_split(files, on_corrupt="Skip")
