"""Checks of the folder of a run that is to be continued."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from revnet._checks import check_path
from revnet._paths import absolute_path
from revnet.errors import CheckpointError, RevnetError
from revnet.training.run import run_dir
from revnet.training.run.checkpoint_folder import CheckpointFolder

_SETTING = re.compile(r"`(\w+)` \(=")
_OF_DATA = ("batch_size", "class_weights", "fraction", "image_size", "length", "num_scales", "val_fraction")
"""Settings that belong to a run, and that are checked against its data."""


def check_same_folder(folder: Path, out_dir: Any) -> None:
    """Raise if the setting `out_dir` names another folder than the one of the run.

    Raises:
        ValueError: It does.
    """
    if out_dir is None:
        return
    check_path("out_dir", out_dir, hint="the folder of the run, or leave it out")
    if absolute_path(out_dir) == os.path.realpath(folder):
        return
    raise ValueError(
        f"`out_dir` (={os.fspath(out_dir)!r}) cannot change within a run, which is in '{folder}'; leave it out, or "
        "start a new run."
    )


def open_checkpoints(folder: Path, command: str) -> None:
    """Make the folder of the checkpoints if a run was killed before it was made.

    Args:
        folder: Folder of the run.
        command: Command that starts a run of this task.

    Raises:
        CheckpointError: The checkpoints of the run were deleted, or are not in a folder.
    """
    path = folder / run_dir.CHECKPOINTS
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"`{path}` must be a folder, but is a file; move it away, and restore the folder.")
    if not CheckpointFolder(path).all() and (later := _later_file(folder)) is not None:
        raise CheckpointError(
            f"`{path}` holds no checkpoint, but the run has written `{later.name}`, which a start from the beginning "
            f"would replace; restore the checkpoints, or start a new run with `{command} --config "
            f"{folder / run_dir.CONFIG} --out-dir NEW`."
        )
    path.mkdir(exist_ok=True)


def _later_file(folder: Path) -> Path | None:
    """Return a file that the run wrote after its first checkpoint, if there is one."""
    if (summary := folder / run_dir.SUMMARY).exists():
        return summary
    log = folder / run_dir.LOG
    # A row is written before its checkpoint, and with `async_save` the checkpoint may take until after the next row.
    if log.is_file() and log.read_bytes().count(b"\n") > 3:
        return log
    weights = folder / run_dir.BEST_WEIGHTS
    return weights if weights.exists() and not (folder / run_dir.CHECKPOINTS).exists() else None


@contextmanager
def errors_of_data(data: Any) -> Iterator[None]:
    """Say that the data are other ones if a setting, which suited the data of the run, does not suit the data at hand.

    Raises:
        CheckpointError: It does not.
    """
    try:
        yield
    except ValueError as error:
        setting = _SETTING.match(str(error))
        # The batch must also be a multiple of the number of devices, which may change.
        is_division = "a multiple of" in str(error)
        if isinstance(error, RevnetError) or setting is None or setting[1] not in _OF_DATA or is_division:
            raise
        reason = str(error).partition(";")[0].rstrip(".")
        raise CheckpointError(
            f"`data` (='{data}') is not what the run was trained on: {reason}; restore the data, or start a new run."
        ) from error
