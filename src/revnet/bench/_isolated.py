"""Traps in a process of their own: a peer that crashes takes nothing with it."""

import multiprocessing
import os
import signal
import warnings
from multiprocessing.connection import Connection
from typing import Any

from revnet.bench.contenders import CONTENDERS, Contender
from revnet.bench.traps import TRAPS, Trap, one_line

_TIMEOUT_SECONDS = 120


def check_isolated(trap: Trap, contender: Contender) -> tuple[str, str]:
    """`trap.check(contender)` in a new process.

    Args:
        trap: One of `TRAPS`.
        contender: One of `CONTENDERS`.

    Returns:
        "ok", "wrong", "raises" or "crashes", and a line about it.
    """
    # A server that has loaded PyTorch once forks for every trap; where there is no fork, every trap loads it itself.
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_check, args=(trap.name, contender.name, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(_TIMEOUT_SECONDS):
            return receiver.recv()
        process.kill()
        return "crashes", f"no answer within {_TIMEOUT_SECONDS} s"
    except EOFError:
        process.join()
        return "crashes", _ending(process.exitcode)
    finally:
        process.join()
        receiver.close()


def _check(trap_name: str, contender_name: str, sender: "Connection[tuple[str, str], None]") -> None:
    import torch

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what torch.compile and the peers have to say besides
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    trap = next(trap for trap in TRAPS if trap.name == trap_name)
    contender = next(contender for contender in CONTENDERS if contender.name == contender_name)
    try:
        result = trap.check(contender)
    except Exception as error:  # of the twin
        result = "raises", f"under plain autograd: {one_line(error)}"
    sender.send(result)


def _ending(exit_code: int | None) -> str:
    return signal.Signals(-exit_code).name if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
