"""What stops a run from outside is reported in one line, and what was saved before remains."""

import errno
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from revnet.errors import ProcessError, RevnetError
from revnet.training import NiceConfig, TrainConfig, resume, train
from revnet.training.run.checkpoint_folder import CheckpointFolder, update_of
from revnet.training.run.failures import explain
from tests.training.samples import assert_same_run, write_image_folder

NICE = NiceConfig(batch_size=200, epochs=2, num_couplings=2, hidden_dim=16, num_hidden=1, save_every=2)


class AtUpdate(Callback):
    """Call a function at the start of an update."""

    def __init__(self, update, function):
        self.update, self.function = update, function

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step + 1 == self.update:
            self.function()


def fail(config, update, function, folder):
    """Return the error of a run that `function` breaks, after a check that it has one line."""
    with pytest.raises(RevnetError) as caught:
        train(replace(config, out_dir=str(folder)), quiet=True, callbacks=[AtUpdate(update, function)])
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("is_async", [False, True])
def test_full_disk(tmp_path, monkeypatch, is_async):
    straight = train(replace(NICE, out_dir=str(tmp_path / "straight")), quiet=True)
    save = torch.save

    def fill_disk():
        def save_none(checkpoint, file):
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError:
                raise RuntimeError("[enforce fail at inline_container.cc]")  # noqa: B904 - as PyTorch does

        monkeypatch.setattr(torch, "save", save_none)

    folder = tmp_path / "run"
    message = fail(replace(NICE, async_save=is_async), 5, fill_disk, folder)
    newest = update_of(CheckpointFolder(folder / "checkpoints").all()[-1])
    # In the background, the one before may not have been written yet.
    assert newest == 4 or (is_async and newest == 2)
    assert message == (
        f"the checkpoints in `{folder}/checkpoints` cannot be written: No space left on device; make room, and "
        f"`revnet train --resume {folder}` continues from update {newest}."
    )
    assert not list(folder.rglob("*.tmp"))
    monkeypatch.setattr(torch, "save", save)
    assert_same_run(straight, resume(folder, quiet=True))


def test_full_disk_while_weights_are_written(tmp_path, monkeypatch):
    def fill_disk():
        monkeypatch.setattr(Path, "write_bytes", raise_full)

    def raise_full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")  # as `write` does, without the name of the file

    folder = tmp_path / "run"
    message = fail(NICE, 5, fill_disk, folder)
    assert message == (
        f"`{folder}/best.safetensors` cannot be written: No space left on device; make room, and `revnet train "
        f"--resume {folder}` continues."
    )


def test_deleted_folder(tmp_path):
    folder = tmp_path / "run"
    message = fail(NICE, 5, lambda: shutil.rmtree(folder), folder)
    assert message.startswith(f"`{folder}")
    assert "` was deleted while the run was going on; " in message
    assert not folder.exists()


def test_killed_worker(tmp_path):
    data = write_image_folder(tmp_path / "data", num_images=12)
    config = TrainConfig(data=str(data), image_size=8, batch_size=4, num_workers=1, val_fraction=0, save_every=1)

    def kill_worker():
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)

    message = fail(config, 3, kill_worker, tmp_path / "run")
    # A hint follows if there is little shared memory.
    reason = (
        f"a process that loads data was killed, which is often due to a lack of memory; `revnet train --resume "
        f"{tmp_path / 'run'}` continues, with fewer `--num-workers` to need less"
    )
    assert message.startswith((reason, "a process that loads data was killed by "))


@pytest.mark.parametrize("error", [ConnectionResetError, ConnectionRefusedError, EOFError])
def test_worker_killed_while_it_hands_over_a_batch(tmp_path, monkeypatch, error):
    data = write_image_folder(tmp_path / "data", num_images=12)
    config = TrainConfig(data=str(data), image_size=8, batch_size=4, num_workers=1, val_fraction=0, save_every=1)

    def lose_connection(*_):
        raise error

    def break_connection():
        for name in ("rebuild_storage_fd", "rebuild_storage_filename"):
            monkeypatch.setattr(torch.multiprocessing.reductions, name, lose_connection)

    message = fail(config, 2, break_connection, tmp_path / "run")
    assert message.startswith("a process that loads data was killed, which is often due to a lack of memory; ")
    assert explain(error(), tmp_path) is None


def test_explains_a_worker_that_is_killed_while_a_checkpoint_is_written(tmp_path):
    error = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 173312 vs 173208")
    error.__context__ = RuntimeError("DataLoader worker (pid 15212) is killed by signal: Killed.")
    assert str(explain(error, tmp_path)).startswith("a process that loads data was killed by Killed, which is often")


def test_explains_lack_of_memory(tmp_path):
    explained = explain(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n 2 GiB"), tmp_path)
    assert isinstance(explained, ProcessError)
    assert str(explained) == (
        f"the GPU is out of memory; `revnet train --resume {tmp_path}` continues, with `--memory-budget` to need less."
    )
    assert "the machine is out of memory" in str(explain(MemoryError(), tmp_path))


def test_leaves_other_errors_alone(tmp_path):
    assert explain(ValueError("wrong"), tmp_path) is None
    assert explain(RuntimeError("mat1 and mat2 shapes cannot be multiplied"), tmp_path) is None
    assert explain(FileNotFoundError(errno.ENOENT, "No such file", "elsewhere.txt"), tmp_path) is None
