"""A process group without other processes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from revnet._torch_internals import fake_store


@contextmanager
def fake_processes(num_processes: int, rank: int) -> Iterator[None]:
    """Make `torch.distributed` treat this process as process `rank` of a group.

    Collectives of the group return at once and move nothing. PyTorch calls it fake for this reason.

    Raises:
        RuntimeError: This process is already in a process group.
    """
    if not dist.is_available():
        raise RuntimeError(
            "this build of PyTorch has no `torch.distributed`, which a prediction needs; install a build that has it."
        )
    if dist.is_initialized():
        raise RuntimeError(
            "this process is already in a process group, so it cannot simulate another one; predict in a process of "
            "its own, for instance with `revnet plan`, or before you call `torch.distributed.init_process_group`."
        )
    dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=num_processes)
    try:
        yield
    finally:
        dist.destroy_process_group()
