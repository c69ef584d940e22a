"""Processes that measure together on this machine, with gloo."""

import datetime
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def run_in_processes(function: Callable[..., Any], *args: Any, num_processes: int) -> list[Any]:
    """Return the result of `function(*args)` in each process of a group, with one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_run, args=(function, args, folder, num_processes), nprocs=num_processes)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(num_processes)]


def _run(rank: int, function: Callable[..., Any], args: tuple[Any, ...], folder: str, num_processes: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=num_processes,
        timeout=datetime.timedelta(seconds=300),
    )
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
