"""Folders of labeled images other than the one that a classifier was trained on."""

import logging
import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

from revnet._image_files import class_folders, image_files, is_plain_folder
from revnet._paths import absolute_path, expand_user
from revnet._units import counted
from revnet.data.sources.plain_folder import fingerprint_folder
from revnet.errors import DataError
from revnet.training.classification.model import ClassifierHeader

_log = logging.getLogger("revnet.data")


def is_new_folder(header: ClassifierHeader, data: str | Path) -> bool:
    """Return whether `data` is a plain folder of classes, and not the one that the weights were trained on.

    A copy of that folder, with files of the same names, counts as that folder.

    Raises:
        DataError: The folder cannot be read.
    """
    if header.split_files is None or absolute_path(data) == os.path.realpath(header.data):
        return False
    return is_plain_folder(Path(data)) and fingerprint_folder(data) != header.split_files


def check_unseen(header: ClassifierHeader, data: str | Path) -> None:
    """Raise if an image in the folder `data` is also in the folder that the weights were trained on.

    A warning says so if that folder cannot be read.

    Raises:
        DataError: An image is in both folders, under any name.
    """
    trained = Path(header.data)
    if not is_plain_folder(trained):
        _log.warning(
            "'%s', which the weights were trained on, cannot be read: images of it among the images in '%s' would make "
            "the accuracy look too high",
            trained,
            data,
        )
        return
    known = _by_size(trained)
    both = {size: files for size, files in _by_size(expand_user(data)).items() if size in known}
    digests = {_digest(file) for size in both for file in known[size]}
    seen = sorted(file for files in both.values() for file in files if _digest(file) in digests)
    if seen:
        raise DataError(
            f"`data` (='{data}') shares {counted(len(seen), 'image')} with '{trained}', which the weights were trained "
            f"on (the first is '{seen[0]}'); remove {'them' if len(seen) > 1 else 'it'}, or leave out `data` to "
            "evaluate on the test images of the training."
        )


def _by_size(folder: Path) -> dict[int, list[str]]:
    """Return the images of all classes in a folder, by their size in bytes."""
    files: dict[int, list[str]] = {}
    for file in _images(class_folders(folder).values()):
        files.setdefault(os.stat(file).st_size, []).append(file)  # noqa: PTH116 - a million of them
    return files


def _images(folders: Iterable[Path]) -> Iterable[str]:
    return (file for folder in folders for file in image_files(folder))


def _digest(file: str) -> bytes:
    return blake2b(Path(file).read_bytes(), digest_size=16).digest()
