"""Shared memory that is too small for the batches of worker processes: one line instead of a run that hangs."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

from revnet.data import load_dataset, make_loader
from revnet.data.loading import _shared_memory
from tests.data.samples import write_image


@pytest.fixture
def split(tmp_path):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            for number in range(4):
                write_image(tmp_path / part / name / f"{number}.png")
    return load_dataset(tmp_path, image_size=8).train


NEEDED = (2 * 2 + 1) * 4 * 3 * 8 * 8
"""Two batches for each of two workers and the one in use, of 4 images."""


def test_workers_need_room_for_their_batches(split, monkeypatch):
    loader = make_loader(split, batch_size=4, shuffle=False, seed=0, num_workers=2)
    monkeypatch.setattr(_shared_memory, "_free_bytes", lambda: NEEDED - 1)
    with pytest.raises(ValueError, match=r"`num_workers` \(=2\) need .* of shared memory for .*--shm-size"):
        next(iter(loader))
    assert not multiprocessing.active_children()


def test_enough_room_is_enough(split, monkeypatch):
    loader = make_loader(split, batch_size=4, shuffle=False, seed=0, num_workers=2)
    monkeypatch.setattr(_shared_memory, "_free_bytes", lambda: NEEDED)
    assert len(list(loader)) == 2
    monkeypatch.setattr(_shared_memory, "_free_bytes", lambda: 0)  # the workers have started already
    assert len(list(loader)) == 2
    loader.close()


def test_no_workers_need_no_room(split, monkeypatch):
    monkeypatch.setattr(_shared_memory, "_free_bytes", lambda: 0)
    assert len(list(make_loader(split, batch_size=4, shuffle=False, seed=0))) == 2


PROGRAM = """
import sys, torch
from pathlib import Path
from revnet.data import load_dataset, make_loader
from revnet.data.loading import _shared_memory
_shared_memory._free_bytes = lambda: None  # another program takes the room after the check
split = load_dataset(Path(sys.argv[1]), image_size=8).train
loader = make_loader(split, batch_size=4, shuffle=False, seed=0, num_workers=1)

def refuse(*_):
    raise RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")

from multiprocessing.reduction import ForkingPickler
from revnet.data.splits.file_split import FileSplit
read = FileSplit.__getitems__

def read_and_fill_memory(self, draws):
    ForkingPickler.register(torch.Tensor, refuse)
    return read(self, draws)

FileSplit.__getitems__ = read_and_fill_memory
try:
    next(iter(loader))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_a_batch_that_cannot_be_handed_out_ends_its_worker(split, tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
    assert "DataLoader worker" in done.stdout
    assert "exited unexpectedly" in done.stdout
    assert "cannot hand out a batch: unable to write to file" in done.stderr
