"""Functions that tests run in several processes."""

import os
import signal
import time
from pathlib import Path

import torch

from revnet.training.processes.choose import choose_world
from revnet.training.processes.join import broadcast, gather, joined


def fail(how: str) -> str:
    """Fail in process 1, or in all of them."""
    world = choose_world("cpu", None)
    with joined(world, "cpu"):
        if how == "raise in both":
            raise ValueError("`number` (=3) must be even.")
        if how == "raise before the other":
            broadcast("both are here")
            if world.rank == 1:
                raise OSError(28, "No space left on device", "folder/file")
        if how == "die" and world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit" and world.rank == 1:
            os._exit(3)
        if how == "own error" and world.rank == 0:
            raise KeyError("a bug")
        broadcast("never")
        torch.distributed.barrier()
    return "finished"


def describe_world() -> list[tuple[int, int, str | None]]:
    """Return what the processes know of themselves."""
    world = choose_world("cpu", None)
    with joined(world, "cpu"):
        with joined(world, "cpu"):
            pass
        ranks = gather((world.rank, world.num_processes, os.environ.get("OMP_NUM_THREADS")))
    with joined(world, "cpu"):  # a second time
        return gather(ranks[world.rank])


def wait(folder: str | None = None) -> None:
    """Wait for a signal."""
    if folder is not None:
        (Path(folder) / f"{os.getpid()}.pid").touch()
    time.sleep(300)
