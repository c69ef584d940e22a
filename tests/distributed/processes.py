"""Run the checks of a test module in several processes, once for all of its tests.

Starting processes takes longer than most checks, so all checks of a module run in the same ones.
"""

import datetime
import traceback
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing


def run_checks(module: str, folder: Path, num_processes: int = 2, name: str = "CHECKS") -> list[dict[str, str]]:
    """Return the outcome of each check in each process: "passed", or the traceback.

    Args:
        module: Name of the module that defines the checks.
        folder: An empty folder for the processes.
        num_processes: Number of processes.
        name: Name of the dict of checks.
    """
    multiprocessing.spawn(_run, args=(module, folder, num_processes, name), nprocs=num_processes)
    return [torch.load(folder / f"{rank}.pt") for rank in range(num_processes)]


def assert_passed(outcomes: list[dict[str, str]], name: str) -> None:
    for rank, outcome in enumerate(outcomes):
        message = outcome.get(name, "not run: the processes stopped before")
        assert message == "passed", f"process {rank}: {message}"


def _run(rank: int, module: str, folder: Path, num_processes: int, name: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=num_processes,
        timeout=datetime.timedelta(seconds=60),
    )
    outcomes = {}
    try:
        for check_name, check in getattr(import_module(module), name).items():
            try:
                check()
                outcomes[check_name] = "passed"
            except Exception:
                outcomes[check_name] = traceback.format_exc()
            dist.barrier()
    finally:
        torch.save(outcomes, folder / f"{rank}.pt")
        dist.destroy_process_group()
