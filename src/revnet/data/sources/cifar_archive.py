"""CIFAR-10 and CIFAR-100 in the original archives, packed or unpacked.

* `cifar-10-python.tar.gz`, `cifar-100-python.tar.gz`: pickles of Python 2
* `cifar-10-binary.tar.gz`, `cifar-100-binary.tar.gz`: rows of bytes
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from revnet._paths import expand_user
from revnet.data.sources._cifar_files import is_archive, read_archive, read_folder
from revnet.data.sources._cifar_pickle import read_batch, read_class_names
from revnet.data.splits.image_dataset import ImageDataset
from revnet.data.splits.image_split import ImageSplit
from revnet.errors import DataError

_SHAPE = (3, 32, 32)
_NUM_PIXELS = 3072


@dataclass(frozen=True)
class _Layout:
    name: str
    folder: str
    """Folder that the archive unpacks to."""
    train_files: tuple[str, ...]
    test_file: str
    names_file: str
    read_images: Callable[[bytes, str], tuple[NDArray[np.uint8], list[int]]]
    read_names: Callable[[bytes, str], tuple[str, ...]]

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train_files, self.test_file, self.names_file)


def is_cifar_archive(path: Path) -> bool:
    """Return whether `load_cifar_archive` should read a path.

    True for any tar archive, since no other data set of this package comes in one, and for a folder with at least two
    files of one of the official layouts, so that `load_cifar_archive` can name the missing ones. False if the path does
    not exist or cannot be read. The check is cheap.

    Args:
        path: A folder or a file; `~` is the home directory.
    """
    try:
        path = expand_user(path)
        return is_archive(path) if path.is_file() else bool(_find_layouts(path))
    except OSError:  # reading the path raises an error that explains the problem
        return False


def load_cifar_archive(path: Path) -> ImageDataset:
    """Load CIFAR-10 or CIFAR-100 from one of the official archives, or from the folder it unpacks to.

    The version is detected from the file names inside. CIFAR-100 has its 100 fine classes. Archives are read in one
    pass, without unpacking them on disk. The pickles of the Python versions are read as data: anything they request
    other than NumPy arrays is refused and not run.

    Args:
        path: The archive, the folder of its files, or the parent of that folder; `~` is the home directory.

    Raises:
        DataError: The path or one of the files is missing, truncated, corrupt, unsafe, or of another layout, or a label
            is out of range. The message names the file.

    References:
        Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images; the data sets' page,
        https://www.cs.toronto.edu/~kriz/cifar.html
    """
    try:
        path = expand_user(path)
        is_file = path.is_file()
        layouts = [] if is_file else _find_layouts(path)
    except OSError as error:  # no permission, a name too long
        raise DataError(f"`path` (='{path}') cannot be opened: {error}; pass a path that can be read.") from error
    if is_file:
        files = read_archive(path, {name for layout in _LAYOUTS for name in layout.files})
        return _load(_only([layout for layout in _LAYOUTS if _is_present(layout, files)], path), files, path)
    layout = _only([layout for layout, _ in layouts], path)
    folder = dict(layouts)[layout]
    return _load(layout, read_folder(folder, layout.files), folder)


def _find_layouts(path: Path) -> list[tuple[_Layout, Path]]:
    """Return each layout with at least two files present, and their folder."""
    layouts = []
    for layout in _LAYOUTS:
        for folder in (path, path / layout.folder):
            if _is_present(layout, {name for name in layout.files if (folder / name).is_file()}):
                layouts.append((layout, folder))
                break
    return layouts


def _is_present(layout: _Layout, names: Collection[str]) -> bool:
    return sum(name in names for name in layout.files) >= 2


def _only(layouts: Sequence[_Layout], path: Path) -> _Layout:
    if not layouts:
        raise DataError(
            f"`path` (='{path}') holds none of the official CIFAR layouts; pass `cifar-10-python.tar.gz`, "
            "`cifar-100-python.tar.gz`, one of their binary versions, or the folder of their files."
        )
    if len(layouts) > 1:
        names = ", ".join(layout.folder for layout in layouts)
        raise DataError(f"`path` (='{path}') holds several data sets ({names}); pass one of them.")
    return layouts[0]


def _load(layout: _Layout, files: dict[str, bytes], root: Path) -> ImageDataset:
    missing = [f"`{name}`" for name in layout.files if name not in files]
    if missing:
        raise DataError(
            f"'{root}' lacks {', '.join(missing)} of the {len(layout.files)} files of {layout.folder}; complete the "
            "download."
        )
    class_names = layout.read_names(files[layout.names_file], f"`{layout.names_file}` in '{root}'")
    if not class_names:
        raise DataError(f"`{layout.names_file}` in '{root}' has no class names; download it again.")

    def read(names: Sequence[str]) -> ImageSplit:
        parts = []
        for name in names:
            pixels, labels = layout.read_images(files.pop(name), f"`{name}` in '{root}'")  # `pop` frees its bytes
            _check(pixels, labels, class_names, f"`{name}` in '{root}'")
            parts.append((pixels, labels))
        images = np.concatenate([pixels for pixels, _ in parts]).reshape(-1, *_SHAPE)
        return ImageSplit(torch.from_numpy(images), torch.tensor([label for _, labels in parts for label in labels]))

    return ImageDataset(
        name=layout.name, train=read(layout.train_files), test=read([layout.test_file]), class_names=class_names
    )


def _check(pixels: NDArray[np.uint8], labels: Sequence[int], class_names: Sequence[str], where: str) -> None:
    if pixels.size == 0:
        raise DataError(f"{where} holds no images; download it again.")
    if pixels.shape[1] != _NUM_PIXELS:
        raise DataError(f"{where} has {pixels.shape[1]} bytes per image, not 3x32x32; download it again.")
    if len(labels) != len(pixels):
        raise DataError(f"{where} has {len(pixels)} images but {len(labels)} labels; download it again.")
    for index, label in enumerate(labels):
        if not 0 <= label < len(class_names):
            raise DataError(
                f"image {index} of {where} has the label {label}, but there are {len(class_names)} classes, so it must "
                f"be in 0..{len(class_names) - 1}; download it again."
            )


def _read_rows(data: bytes, where: str, *, num_labels: int) -> tuple[NDArray[np.uint8], list[int]]:
    """Return the pixels and the last label of each image in a binary file, where labels come before pixels."""
    width = num_labels + _NUM_PIXELS
    if len(data) % width != 0:
        raise DataError(
            f"{where} has {len(data)} bytes, but must be a multiple of the {width} bytes of an image and its label; "
            "the copy is incomplete, download it again."
        )
    rows = np.frombuffer(data, dtype=np.uint8).reshape(-1, width)
    return rows[:, num_labels:], rows[:, num_labels - 1].tolist()


def _read_lines(data: bytes, where: str) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in data.decode().splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{where} must be text, one class name per line; download it again.") from error


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))

_LAYOUTS = (
    _Layout(
        name="cifar10",
        folder="cifar-10-batches-py",
        train_files=_BATCHES,
        test_file="test_batch",
        names_file="batches.meta",
        read_images=partial(read_batch, label_key="labels"),
        read_names=partial(read_class_names, key="label_names"),
    ),
    _Layout(
        name="cifar100",
        folder="cifar-100-python",
        train_files=("train",),
        test_file="test",
        names_file="meta",
        read_images=partial(read_batch, label_key="fine_labels"),
        read_names=partial(read_class_names, key="fine_label_names"),
    ),
    _Layout(
        name="cifar10",
        folder="cifar-10-batches-bin",
        train_files=tuple(f"{name}.bin" for name in _BATCHES),
        test_file="test_batch.bin",
        names_file="batches.meta.txt",
        read_images=partial(_read_rows, num_labels=1),
        read_names=_read_lines,
    ),
    _Layout(
        name="cifar100",
        folder="cifar-100-binary",
        train_files=("train.bin",),
        test_file="test.bin",
        names_file="fine_label_names.txt",
        read_images=partial(_read_rows, num_labels=2),
        read_names=_read_lines,
    ),
)
