"""Start the processes of a run on this machine, watch them, and end them together."""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import TCPStore

from revnet.errors import ProcessError
from revnet.training.processes.join import threads_per_process
from revnet.training.processes.world import World

PAYLOAD, RESULT = "payload.pkl", "result.pkl"
_POLL_SECONDS = 0.05
_LAST_SECONDS = 15.0
"""Time that the processes have to end by themselves once one of them has failed."""

_MOST_SIGNALS = 3


@dataclass(frozen=True)
class Failure:
    """Exception of a process, in a form that another process can read."""

    rank: int
    """Number of the process."""
    is_reported: bool
    """Whether another process reports the failure."""
    error_type: type[BaseException]
    """Class of the exception."""
    arguments: tuple[Any, ...]
    """Its arguments."""
    attributes: Mapping[str, Any]
    """Its attributes."""
    text: str
    """Its traceback."""
    package: str
    """Package that raised it."""

    def to_error(self) -> BaseException:
        """Return the exception, with the traceback of its process as the cause."""
        error = self.error_type.__new__(self.error_type, *self.arguments)
        error.__dict__.update(self.attributes)
        error.__cause__ = RemoteError(self.text, self.package)
        return error


class RemoteError(Exception):
    """The cause of an exception that another process raised: its traceback there."""

    def __init__(self, text: str, package: str) -> None:
        super().__init__(f'\n"""\n{text}"""')
        self.package = package
        """Package that raised the exception."""


def run_in_processes(function: Callable[..., Any], arguments: Mapping[str, Any], world: World) -> Any:
    """Call a function in `world.num_processes` new processes, and return what it returns in the first one.

    The processes are subprocesses of this one, which only waits for them. They do not run the script that calls this
    function, so it needs no `if __name__ == "__main__"`, and works in a notebook. They inherit the output streams.
    Ctrl-C and SIGTERM are passed on to them. If one of them fails, all of them end, and its exception is raised here.

    Args:
        function: Function of a module, which is called in every process.
        arguments: Its arguments by name, which must be picklable.
        world: The processes to start.

    Raises:
        TypeError: An argument cannot be sent to another process.
        ProcessError: A process was killed.
    """
    payload = _pickle(function, arguments, world)
    with tempfile.TemporaryDirectory(prefix="revnet-") as name:
        folder = Path(name)
        (folder / PAYLOAD).write_bytes(payload)
        # The processes meet here: a port chosen in advance might be taken by the time that they start.
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        with _watched_pipe() as pipe:
            processes = [_start(rank, world, store.port, folder, pipe) for rank in range(world.num_processes)]
            with _forwarded(processes) as signals:
                lost = _wait(processes)
        failures = [pickle.loads(path.read_bytes()) for path in sorted(folder.glob("failure_*.pkl"))]
        reported = [failure for failure in failures if not failure.is_reported]
        own = [failure for failure in reported if failure.error_type is not ProcessError]
        if own:
            raise own[0].to_error()
        if signals and lost is not None:
            stop = KeyboardInterrupt()
            stop.signal_number = signals[0]  # type: ignore[attr-defined]
            raise stop
        if lost is not None:
            raise _lost_error(lost, processes[lost].returncode, world)
        return pickle.loads((folder / RESULT).read_bytes())


def _pickle(function: Callable[..., Any], arguments: Mapping[str, Any], world: World) -> bytes:
    way_out = f"start the script with `torchrun --nproc-per-node {world.num_processes}` instead, without `devices`."
    for name, argument in arguments.items():
        for value in argument if isinstance(argument, Sequence) else [argument]:
            if type(value).__module__ == "__main__":
                raise TypeError(
                    f"`{name}` (a {type(value).__name__}) is defined in the script itself, which other processes do "
                    f"not run; move it to a module, or {way_out}"
                )
        try:
            pickle.dumps(argument)
        except Exception as error:
            raise TypeError(f"`{name}` cannot be sent to other processes: {error}; {way_out}") from error
    return pickle.dumps((function, dict(arguments)))


@contextmanager
def _watched_pipe() -> Iterator[int]:
    """Yield the end of a pipe that the processes read: it closes when this process ends, in whatever way."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def _start(rank: int, world: World, port: int, folder: Path, pipe: int) -> subprocess.Popen[bytes]:
    environment = {
        "OMP_NUM_THREADS": str(threads_per_process(world)),
        # Without warnings of PyTorch's C++ code, whose stack traces say less than the error of this process.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **os.environ,
        # As torchrun sets them, so that PyTorch and Lightning know what to do.
        "TORCHELASTIC_RUN_ID": f"revnet-{os.getpid()}",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world.num_processes),
        "LOCAL_WORLD_SIZE": str(world.num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
    }
    return subprocess.Popen(
        # -P: a file in the working directory must not hide a module of Python.
        [sys.executable, "-P", "-m", "revnet.training.processes.worker", str(folder), str(pipe)],
        env=environment,
        stdin=subprocess.DEVNULL,
        pass_fds=(pipe,),
        # Ctrl-C of a terminal then reaches this process only, which passes it on once.
        start_new_session=True,
    )


@contextmanager
def _forwarded(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass Ctrl-C and SIGTERM on to the processes, yield the list of them, and leave no process behind.

    The third signal kills the processes.
    """
    signals: list[int] = []

    def forward(number: int, _frame: Any) -> None:
        signals.append(number)
        for process in processes:
            process.send_signal(number if len(signals) < _MOST_SIGNALS else signal.SIGKILL)

    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        handlers = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait until all processes have ended, and return the first one that failed, if any did."""
    first, deadline = None, float("inf")
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        first = _first_failed(processes)
        if first is not None:
            deadline = min(deadline, time.monotonic() + _LAST_SECONDS)
        time.sleep(_POLL_SECONDS)
    return _first_failed(processes) if first is None else first


def _first_failed(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    # A process that a signal has ended made the others fail.
    failed = [rank for rank, process in enumerate(processes) if process.poll() not in (None, 0)]
    return min(failed, key=lambda rank: (processes[rank].returncode > 0, rank), default=None)


def _lost_error(rank: int, status: int, world: World) -> ProcessError:
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return ProcessError(
        f"process {rank} of {world.num_processes} {how}, so the others were stopped; memory may have run out. A run of "
        "`revnet train` can be resumed."
    )
