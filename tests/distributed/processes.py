"""Run a function, or the checks of a test module, in several processes.

Starting processes takes longer than most checks, so all checks of a module run in the same ones.
"""

import datetime
import os
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

import tests.copies  # noqa: F401 - which says what the copied process imports


def run_in_processes(function: Callable[..., Any], *args: Any, folder: Path, num_processes: int = 2) -> list[Any]:
    """Return the result of `function(*args)` in each process of a group on the CPU.

    Args:
        function: A function of a module.
        *args: Its arguments.
        folder: An empty folder for the processes.
        num_processes: Number of processes.
    """
    environment = dict(os.environ)  # The copied process may be older than some of it.
    arguments = (environment, function, args, folder, num_processes)
    start_processes(_run, arguments, nprocs=num_processes, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(num_processes)]


def run_checks(module: str, folder: Path, num_processes: int = 2, name: str = "CHECKS") -> list[dict[str, str]]:
    """Return the outcome of each check in each process: "passed", or the traceback.

    Args:
        module: Name of the module that defines the checks.
        folder: An empty folder for the processes.
        num_processes: Number of processes.
        name: Name of the dict of checks.
    """
    return run_in_processes(_outcomes, module, name, folder=folder, num_processes=num_processes)


def assert_passed(outcomes: list[dict[str, str]], name: str, killed: tuple[int, ...] = ()) -> None:
    """Check the outcome of a check in each process, apart from those that were killed."""
    for rank, outcome in enumerate(outcomes):
        if rank not in killed:
            message = outcome.get(name, "not run: the processes stopped before")
            assert message == "passed", f"process {rank}: {message}"


def assert_all_pass(module: str, folder: Path, num_processes: int = 2, name: str = "CHECKS") -> None:
    """Run checks as `run_checks` does, and check the outcomes of all."""
    outcomes = run_checks(module, folder, num_processes, name)
    for check_name in getattr(import_module(module), name):
        assert_passed(outcomes, check_name)


def join_group(rank: int, num_processes: int, folder: Path) -> None:
    """Join a group of processes that share an empty folder."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=num_processes,
        timeout=datetime.timedelta(seconds=60),
    )


def _run(
    rank: int,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    folder: Path,
    num_processes: int,
) -> None:
    os.environ.update(environment)
    join_group(rank, num_processes, folder)
    try:
        torch.save(function(*args), folder / f"{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _outcomes(module: str, name: str) -> dict[str, str]:
    outcomes = {}
    for check_name, check in getattr(import_module(module), name).items():
        try:
            check()
            outcomes[check_name] = "passed"
        except Exception:
            outcomes[check_name] = traceback.format_exc()
        dist.barrier()
    return outcomes
