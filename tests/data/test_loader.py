import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from revnet.data import ImageSplit, make_loader


@pytest.fixture
def split() -> ImageSplit:
    """Every image carries its own index as pixel value and as label."""
    numbers = torch.arange(25)
    return ImageSplit(numbers.to(torch.uint8).view(-1, 1, 1, 1), numbers)


def order(loader: DataLoader[tuple[torch.Tensor, torch.Tensor]]) -> list[int]:
    return [int(label) for _, labels in loader for label in labels]


def set_epoch(loader: DataLoader[tuple[torch.Tensor, torch.Tensor]], epoch: int) -> None:
    assert isinstance(loader.sampler, DistributedSampler)
    loader.sampler.set_epoch(epoch)


def test_batches(split: ImageSplit) -> None:
    batches = list(make_loader(split, batch_size=10, shuffle=True, seed=0))
    assert [images.shape for images, _ in batches] == [(10, 1, 1, 1), (10, 1, 1, 1), (5, 1, 1, 1)]
    for images, labels in batches:
        assert images.dtype == torch.uint8
        assert images.flatten().tolist() == labels.tolist()


def test_without_shuffling_the_order_is_that_of_the_split(split: ImageSplit) -> None:
    assert order(make_loader(split, batch_size=10, shuffle=False, seed=0)) == list(range(25))


def test_every_epoch_sees_every_image_once_in_its_own_order(split: ImageSplit) -> None:
    loader = make_loader(split, batch_size=10, shuffle=True, seed=0)
    orders = []
    for epoch in range(3):
        set_epoch(loader, epoch)
        orders.append(order(loader))
        assert sorted(orders[-1]) == list(range(25))
    assert len(set(map(tuple, orders))) == 3


def test_order_is_a_function_of_seed_and_epoch(split: ImageSplit) -> None:
    loader = make_loader(split, batch_size=10, shuffle=True, seed=7)
    set_epoch(loader, 4)
    first = order(loader)
    torch.manual_seed(123)
    resumed = make_loader(split, batch_size=5, shuffle=True, seed=7)
    set_epoch(resumed, 4)
    assert order(resumed) == first
    other = make_loader(split, batch_size=10, shuffle=True, seed=8)
    set_epoch(other, 4)
    assert order(other) != first


@pytest.mark.parametrize("shuffle", [True, False])
def test_global_generator_is_left_alone(split: ImageSplit, shuffle: bool) -> None:
    before = torch.get_rng_state()
    order(make_loader(split, batch_size=10, shuffle=shuffle, seed=0))
    assert torch.equal(torch.get_rng_state(), before)


def test_drop_last(split: ImageSplit) -> None:
    loader = make_loader(split, batch_size=10, shuffle=True, seed=0, drop_last=True)
    assert len(loader) == 2
    assert len(order(loader)) == 20
    assert len(make_loader(split, batch_size=25, shuffle=True, seed=0, drop_last=True)) == 1


def test_one_indexing_operation_a_batch(split: ImageSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_by_one(self: ImageSplit, index: int) -> None:
        raise AssertionError(f"image {index} was fetched alone")

    monkeypatch.setattr(ImageSplit, "__getitem__", one_by_one)
    assert len(order(make_loader(split, batch_size=10, shuffle=True, seed=0))) == 25


def test_bad_arguments(split: ImageSplit) -> None:
    with pytest.raises(ValueError, match=r"`batch_size` \(=0\) must be positive"):
        make_loader(split, batch_size=0, shuffle=True, seed=0)
    with pytest.raises(ValueError, match=r"`batch_size` \(=26\) must not exceed the 25 images .* with `drop_last`"):
        make_loader(split, batch_size=26, shuffle=True, seed=0, drop_last=True)
