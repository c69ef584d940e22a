"""A loader continues after a saved position, by itself and under Lightning."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn

from revnet.data import RandomWindows, make_loader
from revnet.data.loading.loader import Loader
from revnet.data.splits.abstract_split import AbstractSplit
from revnet.data.splits.image_split import ImageSplit

pytestmark = [
    # PyTorch warns on a machine with fewer cores than a test has workers.
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),  # Lightning 2.6, PyTorch 2.13
]

NUM_UPDATES = 6
"""Updates in an epoch of the 25 images."""


def make(split: AbstractSplit, **options: Any) -> Loader:
    return make_loader(split, **({"batch_size": 4, "shuffle": True, "seed": 5, "drop_last": True} | options))


def fingerprint(batch: Any) -> list[float]:
    """Return numbers that differ for different batches."""
    tensors = [batch] if isinstance(batch, Tensor) else batch
    return [number for tensor in tensors for number in tensor.double().flatten().tolist()]


def epoch(loader: Loader | RandomWindows, number: int) -> list[list[float]]:
    loader.sampler.set_epoch(number)
    return [fingerprint(batch) for batch in loader]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_new_loader_continues_after_every_update(any_split: AbstractSplit, num_workers: int) -> None:
    loader = make(any_split, num_workers=num_workers)
    epochs = [epoch(loader, number) for number in range(3)]
    states = [loader.state_dict()]
    loader.sampler.set_epoch(1)
    states = [loader.state_dict(), *(loader.state_dict() for _ in loader)]
    assert [(state["epoch"], state["updates"]) for state in states] == [(1, k) for k in range(NUM_UPDATES + 1)]
    resumed = make(any_split, num_workers=num_workers)
    for k, state in enumerate(states):
        resumed.load_state_dict(state)
        assert resumed.state_dict()["updates"] == k
        assert epoch(resumed, 1) == epochs[1][k:], f"after {k} updates"
        assert epoch(resumed, 2) == epochs[2], "the next epoch starts at its beginning"


def test_an_iteration_starts_at_the_beginning_unless_a_position_was_restored(any_split: AbstractSplit) -> None:
    loader = make(any_split)
    whole = epoch(loader, 0)
    next(iter(loader))
    assert epoch(loader, 0) == whole
    next(iter(loader))
    loader.load_state_dict(loader.state_dict())
    assert epoch(loader, 0) == whole[1:]
    assert epoch(loader, 0) == whole
    next(iter(loader))
    loader.load_state_dict(loader.state_dict())
    assert epoch(loader, 1) == epoch(make(any_split), 1), "another epoch starts at its beginning"


def test_the_position_counts_batches_that_were_handed_out(any_split: AbstractSplit) -> None:
    loader = make(any_split, num_workers=2)  # they read ahead
    batches = iter(loader)
    next(batches)
    next(batches)
    assert loader.state_dict()["updates"] == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_position_fits_any_number_of_processes_and_parts(any_split: AbstractSplit, num_workers: int) -> None:
    whole = epoch(make(any_split, batch_size=8, num_workers=num_workers), 1)
    divided = make(any_split, batch_size=8, num_workers=num_workers, rank=1, num_processes=2, num_parts=2)
    divided.sampler.set_epoch(1)
    batches = iter(divided)
    next(batches), next(batches)
    state = divided.state_dict()
    next(batches)
    assert divided.state_dict() == state, "half of an update does not count"
    resumed = make(any_split, batch_size=8, num_workers=num_workers)
    resumed.load_state_dict(state)
    assert epoch(resumed, 1) == whole[1:]
    one, other = (
        make(any_split, batch_size=8, num_workers=num_workers, rank=rank, num_processes=2) for rank in range(2)
    )
    one.load_state_dict(state)
    other.load_state_dict(state)
    for (images, labels), (more_images, more_labels), expected in zip(one, other, whole[1:], strict=True):
        assert fingerprint((torch.cat([images, more_images]), torch.cat([labels, more_labels]))) == expected


def test_the_last_batch_may_be_smaller(any_split: AbstractSplit) -> None:
    for rank in range(3):
        loader = make(any_split, drop_last=False, num_workers=2, rank=rank, num_processes=3)
        whole = epoch(loader, 1)
        loader.sampler.set_epoch(1)
        states = [loader.state_dict() for _ in loader]
        assert len(states) == len(whole) == 6, "the 25th image is in the sixth batch, since three processes share it"
        for k, state in enumerate(states, start=1):
            loader.load_state_dict(state)
            assert epoch(loader, 1) == whole[k:]


def test_no_image_is_lost_or_repeated_on_another_number_of_processes(any_split: AbstractSplit) -> None:
    # Of the 25 images, one process has seven batches, and three have six, the last of which takes the 25th image.
    def make_all(num_processes: int) -> list[Loader]:
        return [make(any_split, drop_last=False, rank=k, num_processes=num_processes) for k in range(num_processes)]

    def images(loaders: list[Loader]) -> list[Any]:
        return [image.tolist() for parts in zip(*loaders, strict=True) for part, _ in parts for image in part]

    whole = images(make_all(1))
    for before, after in ((1, 3), (3, 1)):
        loaders, resumed = make_all(before), make_all(after)
        states = [loaders[0].state_dict() for _ in loaders[0]]
        for state in states:
            if (before, state["samples"]) == (1, 24):
                with pytest.raises(ValueError, match=r"^`samples` \(=24\) of the saved position must be 25, where"):
                    resumed[0].load_state_dict(state)
                continue
            for loader in resumed:
                loader.load_state_dict(state)
            assert sorted(images(resumed)) == sorted(whole[state["samples"] :])
            assert [loader.state_dict()["samples"] for loader in resumed] == [25] * after
        older = {name: value for name, value in states[2].items() if name != "samples"}
        resumed[0].load_state_dict(older)
        assert resumed[0].state_dict() == states[2]


@pytest.mark.parametrize("num_parts", [1, 2])
def test_windows_continue_after_every_update(num_parts: int) -> None:
    def windows(**options: Any) -> RandomWindows:
        options = {"length": 4, "batch_size": 4, "num_batches": 5, "seed": 7, "num_parts": num_parts} | options
        return RandomWindows(torch.arange(50), **options)

    whole, loader = [epoch(windows(), number) for number in range(3)], windows()
    loader.set_epoch(1)
    for count, _ in enumerate(loader, start=1):
        state = loader.state_dict()
        resumed = windows()
        resumed.load_state_dict(state)
        assert epoch(resumed, 1) == whole[1][count // num_parts * num_parts :]
        assert epoch(resumed, 2) == whole[2]
    with pytest.raises(ValueError, match=r"`length` \(=3\) must equal the 4 of the saved position"):
        windows(length=3).load_state_dict(state)


def test_rejects_a_position_of_another_order(any_split: AbstractSplit) -> None:
    state = make(any_split).state_dict()
    with pytest.raises(ValueError, match=r"^`seed` \(=6\) must equal the 5 of the saved position, which counts .*\.$"):
        make(any_split, seed=6).load_state_dict(state)
    with pytest.raises(ValueError, match=r"`batch_size` \(=5\) must equal the 4 of the saved position"):
        make(any_split, batch_size=5).load_state_dict(state)
    with pytest.raises(ValueError, match=r"`updates` \(=7\) of the saved position must be from 0 to 6"):
        make(any_split).load_state_dict({**state, "updates": 7})
    if "num_workers" in state:
        make(any_split, num_workers=1).load_state_dict(state)  # the same order as without workers
        with pytest.raises(ValueError, match=r"`num_workers` \(=2\) must equal the 1 of the saved position"):
            make(any_split, num_workers=2).load_state_dict(state)


# ---- Lightning


class Record(pl.LightningModule):
    """Module that records its batches, and saves a checkpoint after each of the updates `save_after`."""

    def __init__(self, folder: Path, save_after: Iterable[int] = ()) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.folder = folder
        self.save_after = set(save_after)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append((self.current_epoch, batch_idx, fingerprint(batch)))
        return self.layer(torch.ones(1)).sum()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.global_step in self.save_after:
            self.save_after.remove(self.global_step)
            self.trainer.save_checkpoint(self.folder / f"{self.global_step}.ckpt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def fit(module: Record, loader: Any, num_parts: int, ckpt_path: Path | None = None) -> Record:
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        accumulate_grad_batches=num_parts,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=module.folder,
    )
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module


def check_resumption(make: Callable[[], Any], folder: Path, stops: Iterable[int], num_parts: int = 1) -> None:
    """Resume after each of the updates `stops`, and compare the batches with the ones of an uninterrupted run."""
    whole = fit(Record(folder, stops), make(), num_parts).seen
    assert len(whole) == 3 * NUM_UPDATES * num_parts
    assert len({str(batch) for _, _, batch in whole}) > 0.9 * len(whole), "hardly any batch comes again"
    for stop in stops:
        resumed = fit(Record(folder), make(), num_parts, folder / f"{stop}.ckpt").seen
        assert resumed == whole[stop * num_parts :], f"after {stop} updates"


# In the first epoch and in the second one: after the first update, in the middle, and after the last one.
STOPS = (1, 3, NUM_UPDATES, NUM_UPDATES + 1, NUM_UPDATES + 4, 2 * NUM_UPDATES)


def test_lightning_resumes_within_an_epoch(any_split: AbstractSplit, tmp_path: Path) -> None:
    check_resumption(lambda: make(any_split), tmp_path, STOPS)


def test_lightning_resumes_with_workers(any_split: AbstractSplit, tmp_path: Path) -> None:
    if isinstance(any_split, ImageSplit):
        pytest.skip("no workers")
    check_resumption(lambda: make(any_split, num_workers=2), tmp_path, STOPS[2:5])


def test_lightning_resumes_with_accumulated_gradients(any_split: AbstractSplit, tmp_path: Path) -> None:
    check_resumption(lambda: make(any_split, num_parts=2), tmp_path, STOPS[2:5], num_parts=2)


def test_lightning_resumes_within_an_epoch_of_windows(tmp_path: Path) -> None:
    def windows() -> RandomWindows:
        return RandomWindows(torch.arange(50), length=4, batch_size=4, num_batches=NUM_UPDATES, seed=7)

    check_resumption(windows, tmp_path, STOPS)
