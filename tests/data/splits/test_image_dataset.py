import pytest
import torch

from revnet.data import ImageDataset
from revnet.data.splits.image_split import ImageSplit


def make_split(size: tuple[int, int] = (2, 2)) -> ImageSplit:
    """Return images whose pixels equal their indices."""
    images = torch.arange(12, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, *size).contiguous()
    return ImageSplit(images, torch.arange(12) % 3)


def test_dataset_properties() -> None:
    dataset = ImageDataset("toy", make_split(size=(2, 3)), make_split(size=(2, 3)), ("a", "b", "c", "unseen"))
    assert dataset.num_classes == 4
    assert dataset.in_channels == 1
    assert dataset.image_size == (2, 3)


def test_dataset_rejects_splits_of_different_sizes() -> None:
    with pytest.raises(ValueError, match=r"`test` .* must hold images of the same shape as `train`"):
        ImageDataset("toy", make_split(size=(2, 2)), make_split(size=(3, 2)), ("a", "b", "c"))


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("label", [-1, 3])
def test_dataset_rejects_labels_without_a_name(part: str, label: int) -> None:
    good = make_split()
    bad = ImageSplit(good.images, torch.where(good.labels == 2, label, good.labels))
    splits = {"train": good, "test": good, part: bad}
    with pytest.raises(ValueError, match=rf"`{part}` .* must have labels in 0\.\.2"):
        ImageDataset("toy", **splits, class_names=("a", "b", "c"))
