"""Connect the processes of a run, and let one of them report when one or all of them fail."""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from revnet.errors import ProcessError, RevnetError
from revnet.training.processes.choose import device_of
from revnet.training.processes.world import World, current_world, entered

_numbers = itertools.count()
"""Numbers of the meetings of this process, which are the same in all processes."""


@contextmanager
def joined(world: World, device_name: str) -> Iterator[None]:
    """Connect the processes of `world`, and make it the current world.

    If the body fails, one process reports the error: the attribute `is_reported` of the exception is False there, and
    True in the others. A process that finds the others gone raises a `ProcessError`.

    Args:
        world: The processes.
        device_name: Name of the kind of device.

    Raises:
        ProcessError: Another process has ended in the meantime.
    """
    if world.num_processes == 1 or current_world().num_processes > 1:
        yield
        return
    device = device_of(device_name, world)
    store, is_ours = _connect(world, device)
    try:
        with entered(world):
            yield
            distributed.barrier()
    except BaseException as error:
        is_lost = _is_lost(error)
        is_first = _claim(store, world, is_lost=is_lost)
        failure = _lost_error(is_first=is_first) if is_lost else error
        failure.is_reported = not is_first  # type: ignore[attr-defined]
        # The other processes then fail too, instead of waiting. NCCL would wait itself here.
        if is_ours and device.type != "cuda":
            distributed.destroy_process_group()
        if failure is error:
            raise
        raise failure from error
    if is_ours:
        distributed.destroy_process_group()


def _connect(world: World, device: torch.device) -> tuple[Any, bool]:
    """Return a store that all processes share, and whether the process group is ours."""
    if world.launcher == "SLURM":
        _set_variables(world)
    # Otherwise Lightning would choose a number of threads, against the setting.
    os.environ.setdefault("OMP_NUM_THREADS", str(threads_per_process(world)))
    whole, _, _ = next(rendezvous("env://", world.rank, world.num_processes))
    store = PrefixStore(f"revnet/{next(_numbers)}", whole)
    if distributed.is_initialized():
        return store, False
    options: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options["device_id"] = device
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("group", store),
        rank=world.rank,
        world_size=world.num_processes,
        **options,
    )
    return store, True


def threads_per_process(world: World) -> int:
    """Return the number of threads with which the processes of a node share its cores."""
    return max(1, (os.cpu_count() or 1) // world.num_local)


def _set_variables(world: World) -> None:
    """Set the variables of torchrun under SLURM, so that PyTorch and Lightning know the processes."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_NODELIST", "127.0.0.1"))
    address = SLURMEnvironment.resolve_root_node_address(nodes)
    # Every process knows the number of the job, so it can compute the port.
    port = 15000 + int(os.environ.get("SLURM_JOB_ID", "0")[-4:])
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", str(port))
    os.environ.update(
        RANK=str(world.rank),
        WORLD_SIZE=str(world.num_processes),
        LOCAL_RANK=str(world.local_rank),
        LOCAL_WORLD_SIZE=str(world.num_local),
        GROUP_RANK=os.environ.get("SLURM_NODEID", "0"),
    )


def _is_lost(error: BaseException) -> bool:
    """Return whether the error only says that the connection to another process has ended."""
    if not isinstance(error, RuntimeError) or isinstance(error, RevnetError):
        return False
    signs = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
    return isinstance(error, distributed.DistError) or any(sign in str(error) for sign in signs)


def _lost_error(*, is_first: bool) -> ProcessError:
    if not is_first:
        return ProcessError("another process has failed; see its own error.")
    return ProcessError(
        "another process has ended without an error message, as if it was killed; memory may have run out. A run of "
        "`revnet train` can be resumed."
    )


def _claim(store: Store, world: World, *, is_lost: bool) -> bool:
    """Return whether this process is the first one that fails, and reports its error."""
    name = str(world.rank)
    try:
        return store.compare_set("failed", "", name).decode() == name
    except Exception:
        # The process that kept the store is gone. It has reported its own error, unless it was killed.
        return not is_lost


def broadcast(value: Any) -> Any:
    """Return the main process's `value` in every process of the current world."""
    if current_world().num_processes == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, 0)
    return values[0]


def add_up(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the sum over all processes of the current world, each of which has a `device`, on the CPU."""
    if current_world().num_processes == 1:
        return tensor
    tensor = tensor.to(device, copy=True)
    distributed.all_reduce(tensor)
    return tensor.cpu()


def gather(value: Any) -> list[Any]:
    """Return the values of all processes of the current world, by rank."""
    world = current_world()
    values = [value] * world.num_processes
    if world.num_processes > 1:
        distributed.all_gather_object(values, value)
    return values
