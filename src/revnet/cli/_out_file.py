"""Files that a command writes where the user says, and that must replace nothing else."""

from pathlib import Path

from revnet._atomic_file import open_early
from revnet._image_files import IMAGE_SUFFIXES
from revnet._paths import expand_user
from revnet._result_files import IsOwn, begins_with, may_replace
from revnet.cli._errors import UsageError
from revnet.training.run import run_dir

_WEIGHTS_SUFFIXES = (".safetensors", ".ckpt")
_DEVICES = (Path("/dev"), Path("/proc"))


def open_table(flag: str, place: str | None, head: bytes) -> Path | None:
    """Return the table to write, once it is known that it can be written, and what it replaces.

    Args:
        flag: The option that names it.
        place: Value of the option.
        head: Bytes with which each table of the command begins.

    Raises:
        UsageError: The folder does not exist, or the table would replace another file.
    """
    if place is None:
        return None
    path = expand_user(place)
    check_out_file(flag, path, begins_with(head))
    try:
        open_early(path)
    except OSError as error:
        raise UsageError(
            f"`{flag}` (={place}) cannot be written ({error.strerror}); start the process that reads it, or pass "
            "another file."
        ) from error
    return path


def check_out_file(flag: str, path: Path, is_own: IsOwn) -> None:
    """Raise unless a command may write to `path`, where it may replace nothing but its own results.

    Args:
        flag: The option that names the file.
        path: The file.
        is_own: Function that returns whether a file is a result of this command.

    Raises:
        UsageError: The folder does not exist, or there is another file.
    """
    if path.suffix.lower() in (*IMAGE_SUFFIXES, *_WEIGHTS_SUFFIXES):
        raise UsageError(
            f"`{flag}` (={path}) is the name of an image or of weights, which the file would replace; put another name "
            f"after `{flag}`."
        )
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(
            f"`{flag}` (={path}) must be a file in a folder that exists; create the folder, or name a file."
        )
    if path.name in run_dir.FILES and (path.parent / run_dir.CONFIG).is_file():
        raise UsageError(f"`{flag}` (={path}) is a file of the run in its folder; pass another name.")
    # Nothing is replaced in the folders of devices, where `/dev/stdout` may lead to a file.
    is_device = any(folder in path.absolute().parents for folder in _DEVICES)
    if not is_device and not may_replace(path, is_own):
        raise UsageError(
            f"`{flag}` (={path}) exists, and this command did not write it; pass another name, or delete the file."
        )
