"""A process that `run_in_processes` has started."""

import logging
import os
import pickle
import shutil
import sys
import threading
import traceback
from io import TextIOWrapper
from pathlib import Path
from typing import Any

# PyTorch loads inside `main`, where Ctrl-C is handled.


def main(folder: Path, pipe: int) -> int:
    """Call the function in the payload, and write what it returns or raises.

    Args:
        folder: Folder of the payload.
        pipe: A pipe that closes when the process that started this one has ended.

    Returns:
        The exit status.
    """
    threading.Thread(target=_end_with_starter, args=(folder, pipe), daemon=True).start()
    rank = int(os.environ["RANK"])
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # on its cache of fonts, in every process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a letter that the terminal lacks must not end the run
    try:
        from revnet.training.processes.launch import PAYLOAD, RESULT

        function, arguments = pickle.loads((folder / PAYLOAD).read_bytes())
        result = function(**arguments)
    except BaseException as error:
        (folder / f".failure_{rank}").write_bytes(_describe(error, rank))
        (folder / f".failure_{rank}").rename(folder / f"failure_{rank}.pkl")
        return 1
    if rank == 0:
        (folder / RESULT).write_bytes(pickle.dumps(result))
    return 0


def _end_with_starter(folder: Path, pipe: int) -> None:
    os.read(pipe, 1)
    shutil.rmtree(folder, ignore_errors=True)  # the starter was killed before it could
    os._exit(1)


def _describe(error: BaseException, rank: int) -> bytes:
    from revnet.training.processes.launch import Failure

    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    text = "".join(traceback.format_exception(error))
    is_reported = bool(getattr(error, "is_reported", False))
    package = module.partition(".")[0]
    failure = Failure(rank, is_reported, type(error), _arguments(error), dict(error.__dict__), text, package)
    try:
        content = pickle.dumps(failure)
        pickle.loads(content)
    except Exception:  # an exception that holds a file or a lock, say
        failure = Failure(rank, is_reported, RuntimeError, (str(error),), {}, text, package)
        content = pickle.dumps(failure)
    return content


def _arguments(error: BaseException) -> tuple[Any, ...]:
    """Return the arguments that make the exception again; an `OSError` leaves its file out of `args`."""
    reduced = error.__reduce__()
    return reduced[1] if isinstance(reduced, tuple) else error.args


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
