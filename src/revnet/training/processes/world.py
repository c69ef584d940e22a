"""The processes of a run, and who starts them: a launcher such as torchrun or SLURM, or revnet itself."""

import os
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from revnet._units import nearest_multiples

Launcher = Literal["torchrun", "SLURM"]


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees them."""

    rank: int = 0
    """Number of this process, from 0."""
    num_processes: int = 1
    """Number of processes, on all nodes together."""
    local_rank: int = 0
    """Number of this process on its node, from 0."""
    num_nodes: int = 1
    """Number of nodes, each with the same number of processes."""
    launcher: Launcher | None = None
    """Program that has started the processes; None for a single process."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    @property
    def must_start(self) -> bool:
        """Whether revnet has to start the processes itself."""
        return self.num_processes > 1 and self.launcher is None

    @property
    def num_local(self) -> int:
        """Number of processes on this node."""
        return self.num_processes // self.num_nodes


_current: ContextVar[World] = ContextVar("world", default=World())  # noqa: B039 - a frozen dataclass


def current_world() -> World:
    """Return the processes that have joined, or a world of one process."""
    return _current.get()


@contextmanager
def entered(world: World) -> Iterator[None]:
    """Make `world` the current world."""
    token = _current.set(world)
    try:
        yield
    finally:
        _current.reset(token)


def part_of_batch(batch_size: int, num_parts: int = 1) -> int:
    """Return the number of samples that one process of the current world computes at once.

    Args:
        batch_size: Samples of an update.
        num_parts: Number of parts in which a process computes its samples, one after another.
    """
    return batch_size // (current_world().num_processes * num_parts)


def check_division(batch_size: int, validation: Sized | None = None, *, num_parts: int = 1) -> None:
    """Raise unless the processes of the current world can divide the batches.

    Args:
        batch_size: Samples of an update.
        validation: Samples of a validation, which may be divided unevenly.
        num_parts: Number of parts in which a process computes its samples, one after another.

    Raises:
        ValueError: Processes would get a different number of training samples, or none of the validation samples.
    """
    count = current_world().num_processes
    unit = count * num_parts
    if batch_size % unit:
        rule = f"the {count} processes that divide each batch"
        if num_parts > 1:
            rule = f"{unit}, since {count} processes divide each batch and `accumulate` (={num_parts}) their shares"
        raise ValueError(
            f"`batch_size` (={batch_size}) must be a multiple of {rule}; pass "
            f"{nearest_multiples(batch_size, unit)}, or use another number of `devices`."
        )
    if validation is not None and len(validation) < count:
        raise ValueError(
            f"`val_fraction` leaves {len(validation)} samples for validation, fewer than the {count} processes; pass a "
            "larger one, 0 for no validation, or fewer `devices`."
        )


def launched_world() -> World | None:
    """Return the processes that a launcher has started, or None if it has started a single process or there is none.

    A scheduler sets its variables in the shell of a job too, where it has started one process only. Such a process must
    not wait for others, so only the variables of a job step count.
    """
    world = _torchrun_world() if "TORCHELASTIC_RUN_ID" in os.environ else _slurm_world()
    return world if world is not None and world.num_processes > 1 else None


def is_printing() -> bool:
    """Return whether this process prints results, among all that a launcher has started."""
    world = launched_world()
    return world is None or world.is_main


def is_reported(error: BaseException) -> bool:
    """Return whether another process reports an error: the one that failed first, or the main one before they join."""
    reported = getattr(error, "is_reported", None)
    return not is_printing() if reported is None else bool(reported)


def _torchrun_world() -> World:
    num_processes, num_local = (int(os.environ[name]) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if num_processes % num_local:
        raise ValueError(
            f"`--nproc-per-node` (={num_local}) must be the same on all nodes, and torchrun has started "
            f"{num_processes} processes in all; start the same number on each node."
        )
    return World(
        rank=int(os.environ["RANK"]),
        num_processes=num_processes,
        local_rank=int(os.environ["LOCAL_RANK"]),
        num_nodes=num_processes // num_local,
        launcher="torchrun",
    )


def _slurm_world() -> World | None:
    # `srun` sets the first two for the processes of a step. Interactive shells have names that Lightning knows too.
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in os.environ for name in names) or os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    num_processes, rank, local_rank = (int(os.environ[name]) for name in names)
    num_nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES", "1")))
    if num_processes > 1 and num_processes % num_nodes:
        raise ValueError(
            f"`--ntasks` (={num_processes}) of SLURM must be a multiple of the {num_nodes} nodes, each of which runs "
            "the same number of processes; pass `--ntasks-per-node` instead."
        )
    return World(rank=rank, num_processes=num_processes, local_rank=local_rank, num_nodes=num_nodes, launcher="SLURM")
