"""Processes that are copies of one which has imported everything: a fresh interpreter needs seconds for that."""

import multiprocessing
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.multiprocessing import start_processes

_IMPORTED = ["pytest", "torch._dynamo", "torch.distributed.fsdp", "revnet.distributed", "revnet.models"]
_IMPORTED += ["lightning.pytorch", "revnet.training.run.execute"]

copied_processes = multiprocessing.get_context("forkserver")
copied_processes.set_forkserver_preload(_IMPORTED)


def launcher_environment(rank: int, num_processes: int, port: int) -> dict[str, str]:
    """Return the variables that a launcher such as torchrun sets for a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
    }


def launch_copies(function: Callable[..., Any], arguments: Mapping[str, Any], num_processes: int = 2) -> Any:
    """Call a function in processes of a launcher, and return what it returns in the first one.

    It does what `revnet.training.processes.launch.run_in_processes` does, except for what happens after failures.

    Args:
        function: Function of a module.
        arguments: Its arguments by name.
        num_processes: Number of processes.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with TemporaryDirectory() as name:
        result = Path(name) / "result.pkl"
        payload = (dict(os.environ), function, arguments, num_processes, store.port, result)
        start_processes(_work, payload, nprocs=num_processes, start_method="forkserver")
        return pickle.loads(result.read_bytes())


def _work(
    rank: int,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    num_processes: int,
    port: int,
    result: Path,
) -> None:
    os.environ |= environment  # The copied process may be older than some of it.
    os.environ |= launcher_environment(rank, num_processes, port) | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    returned = function(**arguments)
    if rank == 0:
        result.write_bytes(pickle.dumps(returned))
