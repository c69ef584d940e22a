"""Loaders of several processes yield the batches of one, in memory, from files and from streams."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from revnet.data import make_loader
from revnet.data.loading.loader import Loader
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.data.splits.file_split import FileSplit
from revnet.data.splits.image_split import ImageSplit
from revnet.errors import DataError
from tests.data.samples import NUM_STREAMED, split_with_an_empty_file

# PyTorch warns on a machine with fewer cores than a test has workers.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def batches(loader: Loader, epoch: int = 1) -> list[tuple[Tensor, Tensor]]:
    loader.sampler.set_epoch(epoch)
    result = list(loader)
    assert len(result) == len(loader)
    return result


def assert_equal(parts: list[tuple[Tensor, Tensor]], whole: tuple[Tensor, Tensor]) -> None:
    for tensors, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(tensors), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(("num_processes", "num_parts"), [(2, 1), (1, 3), (2, 3)])
def test_training_batches_of_all_processes_are_the_batches_of_one(
    any_split: AbstractSplit, num_workers: int, num_processes: int, num_parts: int
) -> None:
    def make(rank: int, num_processes: int, num_parts: int) -> Loader:
        return make_loader(
            any_split,
            batch_size=6,
            shuffle=True,
            seed=3,
            drop_last=True,
            num_workers=num_workers,
            rank=rank,
            num_processes=num_processes,
            num_parts=num_parts,
        )

    whole = batches(make(0, 1, 1))
    assert len(whole) == 4
    divided = [batches(make(rank, num_processes, num_parts)) for rank in range(num_processes)]
    for update, expected in enumerate(whole):
        parts = [part for own in divided for part in own[update * num_parts : (update + 1) * num_parts]]
        assert {len(labels) for _, labels in parts} == {6 // (num_processes * num_parts)}
        assert_equal(parts, expected)


@pytest.mark.parametrize(
    ("num_processes", "batch_size", "num_workers"),
    [(2, 12, 0), (3, 4, 0), (4, 8, 0), (4, 3, 0), (8, 25, 0), (25, 1, 0), (3, 4, 2), (4, 8, 2)],
)
def test_validation_leaves_nothing_out_and_reads_nothing_twice(
    any_split: AbstractSplit, num_processes: int, batch_size: int, num_workers: int
) -> None:
    divided = [
        batches(
            make_loader(
                any_split,
                batch_size=batch_size,
                shuffle=False,
                seed=3,
                num_workers=num_workers,
                rank=rank,
                num_processes=num_processes,
            )
        )
        for rank in range(num_processes)
    ]
    assert len({len(own) for own in divided}) == 1
    sizes = [len(labels) for own in divided for _, labels in own]
    assert min(sizes) >= 1
    assert max(sizes) <= -(-max(batch_size, num_processes) // num_processes) + 1
    labels = torch.cat([labels for own in divided for _, labels in own])
    assert labels.sort().values.tolist() == list(range(NUM_STREAMED))


def test_a_process_decodes_only_its_own_images(any_split: AbstractSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(any_split, ImageSplit):
        pytest.skip("nothing to decode")
    decoded = []
    crop = type(any_split.crop).box
    monkeypatch.setattr(type(any_split.crop), "box", lambda *args: decoded.append(args) or crop(*args))
    batches(make_loader(any_split, batch_size=6, shuffle=True, seed=0, drop_last=True, rank=1, num_processes=2))
    # The row that is left over at the end of a stream is decoded by every process.
    assert len(decoded) == 4 * 3 + (not isinstance(any_split, FileSplit))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_slice_without_decodable_images_stops_the_run(tmp_path: Path, num_workers: int) -> None:
    split = split_with_an_empty_file(tmp_path, 4, empty=3)

    def make(rank: int) -> Loader:
        return make_loader(
            split, batch_size=2, shuffle=False, seed=0, rank=rank, num_processes=2, num_workers=num_workers
        )

    assert [labels.tolist() for _, labels in make(0)] == [[0], [2]]
    with pytest.raises(DataError, match=r"^no image of a process's part of a batch can be decoded; restore the files"):
        list(make(1))


def test_rejects_bad_divisions(any_split: AbstractSplit) -> None:
    options = {"shuffle": False, "seed": 0}
    with pytest.raises(ValueError, match=r"`batch_size` \(=5\) must be a multiple of 2, .* pass 4 or 6\.$"):
        make_loader(any_split, batch_size=5, drop_last=True, num_processes=2, **options)
    with pytest.raises(ValueError, match=r"`num_parts` \(=2\) needs `drop_last`"):
        make_loader(any_split, batch_size=4, num_parts=2, **options)
    with pytest.raises(ValueError, match=r"`num_processes` \(=26\) must not exceed the 25 images of the split"):
        make_loader(any_split, batch_size=4, num_processes=26, **options)
    with pytest.raises(ValueError, match=r"`rank` \(=2\) must be from 0 to 1"):
        make_loader(any_split, batch_size=4, rank=2, num_processes=2, **options)
