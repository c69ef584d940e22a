"""Runs in processes that are killed at random moments, and what must be true afterwards."""

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from safetensors import safe_open

from revnet.errors import ProcessError
from revnet.training import resume, train
from revnet.training.run.checkpoint import read_checkpoint
from revnet.training.run.checkpoint_folder import CheckpointFolder, update_of
from tests.copies import copied_processes, launcher_environment

_TIMEOUT = 300.0
_LAST_SECONDS = 60.0
"""Time that the other processes have to end by themselves once one of them has been killed."""
_PROGRESS = "progress"


class WriteProgress(Callback):
    """Write the number of finished updates to a file outside the run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        started_path(self.path, trainer.global_rank).touch()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.is_global_zero:
            self.path.write_text(str(trainer.global_step))


def started_path(progress: Path, rank: int) -> Path:
    """Return the file that a process makes when it begins to train."""
    return progress.with_name(f"{progress.name}_{rank}")


def work(config: Any, folder: Path, rank: int, num_processes: int, port: int) -> None:
    """Start the run in `folder`, or continue it."""
    if num_processes > 1:
        os.environ |= launcher_environment(rank, num_processes, port)
    progress = WriteProgress(folder.with_name(f"{folder.name}.{_PROGRESS}"))
    try:
        if (folder / "config.yaml").is_file():
            resume(folder, quiet=True, callbacks=[progress])
        else:
            train(replace(config, out_dir=str(folder)), quiet=True, callbacks=[progress])
    except ProcessError:
        sys.exit(1)


@dataclass
class Driver:
    """Runs of one configuration, killed and resumed."""

    config: Any
    """Settings, with `save_every` in updates."""
    num_processes: int
    """Processes of each run."""
    random: random.Random
    """Source of the moments."""
    most_lost: int = field(default=0, init=False)
    """Largest number of updates that a kill has lost."""

    def run(self, folder: Path) -> float:
        """Let a run in `folder` end, and return its time."""
        start = time.monotonic()
        processes = self._start(folder)
        deadline = start + _TIMEOUT
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        _end_all(processes)
        assert codes == [0] * self.num_processes, codes
        return time.monotonic() - start

    def kill(self, folder: Path, seconds: float) -> bool:
        """Start or continue a run, kill one of its processes, and return whether it was in time.

        Args:
            folder: Folder of the run.
            seconds: Time of a run without kills. Half of the kills come at a random moment of this time, the others
                while a file is written.
        """
        processes = self._start(folder)
        victim = self.random.choice(processes)
        if self.random.random() < 0.5:
            time.sleep(self.random.uniform(0, seconds))
        else:
            _wait_for_write(folder, victim, self.random.randrange(6), seconds)
        was_alive = victim.is_alive()
        victim.kill()
        deadline = time.monotonic() + _LAST_SECONDS
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        have_met = all(path.exists() for path in self._started_paths(folder))
        # Processes that wait for one which never came are ended by the launcher.
        assert not have_met or all(process.exitcode is not None for process in processes), "a process is left over"
        _end_all(processes)
        self._check(folder)
        return was_alive

    def _started_paths(self, folder: Path) -> list[Path]:
        progress = folder.with_name(f"{folder.name}.{_PROGRESS}")
        return [started_path(progress, rank) for rank in range(self.num_processes)]

    def _start(self, folder: Path) -> list[Any]:
        for path in self._started_paths(folder):
            path.unlink(missing_ok=True)
        port = self.random.randrange(20_000, 60_000)
        processes = [
            copied_processes.Process(target=work, args=(self.config, folder, rank, self.num_processes, port))
            for rank in range(self.num_processes)
        ]
        for process in processes:
            process.start()
        return processes

    def _check(self, folder: Path) -> None:
        """Check that no file is half written, and that one interval is lost at most."""
        checkpoints = CheckpointFolder(folder / "checkpoints").all()
        for path in checkpoints:
            read_checkpoint(path)
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                assert file.metadata()
        progress = folder.with_name(f"{folder.name}.{_PROGRESS}")
        num_done = int(progress.read_text() or 0) if progress.is_file() else 0
        num_saved = update_of(checkpoints[-1]) if checkpoints else 0
        lost = num_done - num_saved
        self.most_lost = max(self.most_lost, lost)
        # A checkpoint in the background may still be written when the next interval begins.
        assert lost <= self.config.save_every * (2 if self.config.async_save else 1)


def _wait_for_write(folder: Path, process: Any, num_skipped: int, seconds: float) -> None:
    """Wait until a file is being written, after `num_skipped` others."""
    deadline = time.monotonic() + 2 * seconds
    seen: set[str] = set()
    while time.monotonic() < deadline and process.is_alive():
        seen |= set(_temporary_names(folder))
        if len(seen) > num_skipped:
            return
        time.sleep(0.0001)


def _temporary_names(folder: Path) -> Iterator[str]:
    for place in (folder, folder / "checkpoints"):
        try:
            yield from (f"{name} {os.stat(place / name).st_mtime_ns}" for name in os.listdir(place) if name[0] == ".")  # noqa: PTH116, PTH208
        except OSError:
            continue


def _end_all(processes: list[Any]) -> None:
    for process in processes:
        process.kill()
        process.join()


def kill_and_compare(
    driver: Driver, tmp_path: Path, num_kills: int, num_kills_of_a_run: int, compare: Callable[[Path, Path], None]
) -> int:
    """Kill runs until there were `num_kills`, compare each with one that was not killed, and return the number of runs.

    Raises:
        AssertionError: A run ended differently, a file was half written, too much was lost, or a process is left over.
    """
    straight = tmp_path / "straight"
    seconds = driver.run(straight)
    num_done = num_runs = 0
    while num_done < num_kills:
        folder = tmp_path / f"killed_{num_runs}"
        for _ in range(min(num_kills_of_a_run, num_kills - num_done)):
            num_done += driver.kill(folder, seconds)
        driver.run(folder)
        compare(straight, folder)
        num_runs += 1
    return num_runs
