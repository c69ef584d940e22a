"""Image files in folders: which files count as images, and how a folder of classes is laid out.

Nothing here needs PyTorch, so that the command line can look at a folder at once.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from revnet._paths import expand_user

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
"""Suffixes of the files that are read as images, in lower case."""

OTHER_SUFFIXES = (".heic", ".heif", ".avif", ".jp2", ".jxl", ".jfif", ".dng", ".cr2", ".nef", ".arw", ".psd", ".svg")
"""Suffixes of images in formats that are not read, in lower case."""

TRAIN = "train"
"""Name of the folder of training images."""

TESTS = ("test", "val", "validation", "valid")
"""Possible names of the test split; the first with a class folder is used (ImageNet's `test` is unlabeled)."""

_PARTS = frozenset({TRAIN, "training", *TESTS, "testing"})


def class_folders(folder: Path) -> dict[str, Path]:
    """Return the folders directly inside `folder`, by name, sorted; empty if `folder` is not a folder."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry))
    return {name: folder / name for name in names}


def is_image_name(name: str) -> bool:
    """Return whether a file of this name counts as an image."""
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def image_files(folder: str | Path, others: list[str] | None = None) -> Iterator[str]:
    """Yield the image files in a folder and the folders inside it, in any order; names with a leading dot are hidden.

    A link to a folder that contains the link is not followed.

    Args:
        folder: The folder.
        others: List to which the images in formats that are not read are added.
    """
    return _image_files(os.fspath(folder), (os.path.realpath(folder),), [] if others is None else others)


def loose_images(folder: Path) -> list[str]:
    """Return the names of the images directly inside `folder`, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if is_image_name(entry.name) and not _is_folder(entry))


def is_image_folder(path: Path) -> bool:
    """Return whether a path holds a folder `train` without parquet files.

    False if the path does not exist or cannot be read.

    Args:
        path: A folder; `~` is the home directory.
    """
    try:
        train = expand_user(path) / TRAIN
        return train.is_dir() and not any(train.glob("*.parquet"))
    except OSError:  # reading the path raises an error that explains the problem
        return False


def is_plain_folder(path: Path) -> bool:
    """Return whether a path is a folder that holds images, at any depth, and neither `train` nor parquet files.

    False if the path does not exist or cannot be read.

    Args:
        path: A folder; `~` is the home directory.
    """
    try:
        folder = expand_user(path)
        if not folder.is_dir() or (folder / TRAIN).is_dir():
            return False
        if any(any(folder.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet")):
            return False
        return any(True for _ in image_files(folder))
    except OSError:  # reading the path raises an error that explains the problem
        return False


def list_images(paths: Iterable[str | Path]) -> list[Path]:
    """Return the files that paths stand for, in the order of the paths.

    A folder stands for the images in it and in the folders inside it, sorted. A pattern such as `photos/*.jpg`, if no
    file has that name, stands for what it matches, sorted; `**` matches any number of folders. Other paths stand for
    themselves, and so do folders without images and patterns without a match.

    Raises:
        ValueError: A path is empty.
    """
    paths = list(paths)
    if "" in paths:
        raise ValueError("`paths` holds an empty path; leave it out, or pass '.' for the current folder.")
    return [file for path in paths for file in _files_of(Path(path))]


def explain_link(path: str | Path) -> str | None:
    """Return why a path leads nowhere if it is a link, as the end of a sentence; None if it is not such a link."""
    path = expand_user(path)
    if not os.path.islink(path) or os.path.exists(path):  # noqa: PTH110, PTH114 - `Path` fails for a loop
        return None
    target = os.readlink(path)  # noqa: PTH115
    if os.path.lexists(os.path.join(os.path.dirname(path), target)):  # noqa: PTH118, PTH120
        return f"is a link to '{target}', which leads back to itself or to nothing; correct the link"
    return f"is a link to '{target}', which does not exist; correct the link"


def is_pattern(path: Path) -> bool:
    """Return whether a path is a pattern, and not the name of a file."""
    return glob.has_magic(str(path)) and not os.path.lexists(path)


def part_among_classes(names: dict[str, Path]) -> str | None:
    """Return the first name that is a part of a data set, such as `Training`, rather than a class."""
    return next((name for name in names if name.lower() in _PARTS), None)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, which fails when it is read
        return False


def _image_files(folder: str, parents: tuple[str, ...], others: list[str]) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            # Checks by name come first, since `is_dir` may have to read from the disk.
            if entry.name.startswith("."):
                continue
            if is_image_name(entry.name) and not _is_folder(entry):
                yield entry.path
            elif _is_folder(entry):
                inside = os.path.realpath(entry.path) if entry.is_symlink() else f"{parents[-1]}{os.sep}{entry.name}"
                if inside not in parents:
                    yield from _image_files(entry.path, (*parents, inside), others)
            elif entry.name.lower().endswith(OTHER_SUFFIXES):
                others.append(entry.path)


def _files_of(path: Path) -> list[Path]:
    if is_pattern(path):
        matches = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207 - `Path` has no absolute patterns
        # A pattern with `**` matches a folder, and the files in it.
        files = dict.fromkeys(file for match in matches for file in _files_of(Path(match)) if not file.is_dir())
        return list(files) or [path]
    if path.is_dir():
        return [Path(file) for file in sorted(image_files(path))] or [path]
    return [path]
