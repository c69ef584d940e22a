"""Run a pitfall in a separate process, so that a library that crashes does not end the benchmark."""

import multiprocessing
import os
import signal
import warnings
from multiprocessing.connection import Connection
from typing import Any

from revnet.bench.methods import METHODS, Method
from revnet.bench.pitfalls import PITFALLS, Pitfall, one_line

_TIMEOUT_SECONDS = 120


def check_isolated(pitfall: Pitfall, method: Method) -> tuple[str, str]:
    """Run `pitfall.check(method)` in a new process.

    Args:
        pitfall: One of `PITFALLS`.
        method: One of `METHODS`.

    Returns:
        "ok", "wrong", "raises" or "crashes", and one line of explanation.
    """
    # The fork server loads PyTorch once for all pitfalls. Without fork, each process loads it again.
    can_fork = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if can_fork else "spawn")
    context.set_forkserver_preload([__name__, "torch._dynamo"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_check, args=(pitfall.name, method.name, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(_TIMEOUT_SECONDS):
            return receiver.recv()
        process.kill()
        return "crashes", f"no answer within {_TIMEOUT_SECONDS} s"
    except EOFError:
        process.join()
        return "crashes", _describe_exit(process.exitcode)
    finally:
        process.join()
        receiver.close()


def _check(pitfall_name: str, method_name: str, sender: "Connection[tuple[str, str], None]") -> None:
    import torch

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # silence the logs of torch.compile and the other libraries
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pitfall = next(pitfall for pitfall in PITFALLS if pitfall.name == pitfall_name)
    method = next(method for method in METHODS if method.name == method_name)
    try:
        result = pitfall.check(method)
    except Exception as error:  # raised by plain autograd
        result = "raises", f"under plain autograd: {one_line(error)}"
    sender.send(result)


def _describe_exit(exit_code: int | None) -> str:
    return signal.Signals(-exit_code).name if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
