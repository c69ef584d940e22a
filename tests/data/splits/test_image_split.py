import pytest
import torch

from revnet.data.splits.image_split import ImageSplit


def make_split(num_images: int = 12, num_classes: int = 3) -> ImageSplit:
    """Return images whose pixels equal their indices."""
    images = torch.arange(num_images, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return ImageSplit(images, torch.arange(num_images) % num_classes)


def test_split_is_a_dataset_of_pairs() -> None:
    split = make_split()
    image, label = split[4]
    assert len(split) == 12
    assert torch.equal(image, split.images[4])
    assert label == 1
    assert [int(label) for _, label in split] == [0, 1, 2] * 4


def test_split_prints_its_shape_without_pixels() -> None:
    assert repr(make_split()) == "ImageSplit(images=uint8 of shape (12, 1, 2, 2))"


def test_split_gives_a_whole_batch_at_once() -> None:
    images, labels = make_split().__getitems__([5, 0, 5])
    assert images[:, 0, 0, 0].tolist() == [5, 0, 5]
    assert labels.tolist() == [2, 0, 2]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64), r"`images` \(=float32 of shape \(3, 1, 2, 2\)\)"),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"\(N, C, H, W\)"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3), r"`labels` \(=float32 of shape \(3,\)\)"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), r"int64 of shape \(3,\)"),
        (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "must not be empty"),
    ],
)
def test_split_rejects_bad_tensors(images: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSplit(images, labels)
