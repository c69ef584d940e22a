"""Loaders yield a key for each image, which determines its augmentation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from revnet.data import make_augment, make_loader
from revnet.data._random_keys import image_keys
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.data.splits.image_split import ImageSplit
from revnet.data.splits.stream_split import StreamSplit
from tests.data.samples import NUM_STREAMED, split_with_an_empty_file

# PyTorch warns on a machine with fewer cores than a test has workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def keys_by_label(split: AbstractSplit, epoch: int = 1, **options: Any) -> Tensor:
    """Return the key of every image, in the order of their labels, which are all different."""
    options = {"batch_size": 4, "shuffle": True, "seed": 5, "keys": True} | options
    parts = []
    for rank in range(options.get("num_processes", 1)):
        loader = make_loader(split, **options, rank=rank)
        loader.sampler.set_epoch(epoch)
        parts += [(labels, keys) for _, labels, keys in loader]
    labels, keys = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    assert keys.dtype == torch.int64
    return keys[labels.argsort()]


def test_keys_are_a_function_of_seed_epoch_and_image(any_split: AbstractSplit) -> None:
    keys = keys_by_label(any_split)
    assert len(keys.unique()) == NUM_STREAMED
    for options in (
        {"batch_size": 7},
        {"num_workers": 2},
        {"num_processes": 3},
        {"num_processes": 2, "num_workers": 2},
    ):
        assert torch.equal(keys_by_label(any_split, **options), keys), options
    assert not (keys_by_label(any_split, epoch=2) == keys).any()
    assert not (keys_by_label(any_split, seed=6) == keys).any()
    if not isinstance(any_split, StreamSplit):
        assert torch.equal(keys, image_keys(5, 1, torch.arange(NUM_STREAMED)))


def test_keys_without_shuffling_are_the_same_in_every_epoch(any_split: AbstractSplit) -> None:
    keys = keys_by_label(any_split, shuffle=False)
    assert torch.equal(keys_by_label(any_split, epoch=2, shuffle=False), keys)
    assert torch.equal(keys_by_label(any_split, epoch=0), keys)


def test_a_resumed_or_divided_run_augments_in_the_same_way(any_split: AbstractSplit) -> None:
    if isinstance(any_split, ImageSplit):
        any_split = ImageSplit(any_split.images[:, :, :4, :4].contiguous(), any_split.labels)
    augment = make_augment(1, True, (4, 4), cutout=1)

    def batches(**options: Any) -> list[Tensor]:
        options = {"batch_size": 6, "shuffle": True, "seed": 5, "drop_last": True, "keys": True} | options
        loader = make_loader(any_split, **options)
        loader.sampler.set_epoch(1)
        return [augment(images.float() + 1, keys) for images, _, keys in loader]

    whole = batches()
    torch.manual_seed(1)  # nothing depends on the global generator
    ranks = [batches(rank=rank, num_processes=2) for rank in range(2)]
    for first, second, batch in zip(*ranks, whole, strict=True):
        assert torch.equal(torch.cat([first, second]), batch)
    plain = make_loader(any_split, batch_size=6, shuffle=True, seed=5, drop_last=True)
    plain.sampler.set_epoch(1)
    assert not any(torch.equal(images.float() + 1, batch) for (images, _), batch in zip(plain, whole, strict=True))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipped_images_have_no_keys(tmp_path: Path, num_workers: int) -> None:
    split = split_with_an_empty_file(tmp_path, 6, empty=2)
    kept = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(keys_by_label(split, num_workers=num_workers), image_keys(5, 1, kept))


@pytest.mark.gpu
def test_keys_are_in_page_locked_memory(any_split: AbstractSplit) -> None:
    for batch in make_loader(any_split, batch_size=4, shuffle=True, seed=0, keys=True, pin_memory=True):
        assert all(tensor.is_pinned() for tensor in batch)
