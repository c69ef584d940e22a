"""Data sets by name, and by what lies at a path."""

from __future__ import annotations

import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from revnet.data._base import ImageDataset
from revnet.data._batch import DEFAULT_IMAGE_SIZE, OnCorrupt, check_image_size, check_on_corrupt
from revnet.data._crop import RandomCrop
from revnet.data.cifar import load_cifar10, load_cifar100
from revnet.data.cifar_archive import is_cifar_archive, load_cifar_archive
from revnet.data.digits import load_digits
from revnet.data.hub import HUB_PREFIX, load_hub_dataset, load_imagenet
from revnet.data.image_folder import is_image_folder, load_image_folder
from revnet.data.parquet_folder import load_parquet_folder
from revnet.errors import DataError

_OF_ONE_SIZE: dict[str, Callable[[OnCorrupt], ImageDataset]] = {
    "cifar10": lambda on_corrupt: load_cifar10(on_corrupt=on_corrupt),
    "cifar100": lambda on_corrupt: load_cifar100(on_corrupt=on_corrupt),
    "digits": lambda _: load_digits(),
}
_OF_MANY_SIZES: dict[str, Callable[..., ImageDataset]] = {
    "imagenet": load_imagenet,
}


def list_datasets() -> list[str]:
    """The names that `load_dataset` knows, sorted."""
    return sorted((*_OF_ONE_SIZE, *_OF_MANY_SIZES))


def load_dataset(
    name_or_path: str | Path,
    *,
    image_size: int | None = None,
    on_corrupt: OnCorrupt = "stop",
    crop_area: tuple[float, float] = (0.08, 1.0),
) -> ImageDataset:
    """Load a data set by its name, or the one that lies at a path.

    At a path, the layout is found by looking:

    * one of the archives of CIFAR-10 or CIFAR-100, or the folder that it unpacks to, see `load_cifar_archive`;
    * a folder of image files, `train/<class>/*.jpg` beside `val/<class>/*.jpg`, see `load_image_folder`;
    * a folder in the hub's layout, `train-*.parquet` beside `test-*.parquet`, see `load_parquet_folder`.

    Images of one size are loaded into memory. Images of many sizes (image files, ImageNet and whatever comes from the
    hub by `hub:`, and parquet files if there is an `image_size`) are read as they are needed, and come out as RGB of
    `image_size` x `image_size`. Of a training image a random part is taken, another in each epoch: its area is uniform
    between the shares in `crop_area`, its aspect log-uniform in 3/4..4/3. Of a test image it is the middle: the shorter
    side becomes `image_size` / 0.875 long, and the border is cut off.

    A known name comes before a folder that happens to be called the same; write `./cifar10` for the folder.

    Args:
        name_or_path: A name of `list_datasets()`, an address on the Hugging Face hub such as `hub:owner/name`, or a
            path; `~` is the home directory.
        image_size: Height and width that images of many sizes are brought to, 224 if it is not given. None to keep the
            images of parquet files as they are.
        on_corrupt: What to do about an image that cannot be decoded: "stop" raises a DataError naming it, when it is
            come to; "skip" leaves it out and says so once.
        crop_area: Least and largest share of a training image that a random crop takes.

    Raises:
        ValueError: `name_or_path` is neither a known name nor a path, or an option is out of range, or `image_size` is
            given for images that come in a size of their own.
        DataError: The data are missing, corrupt, of another layout, or cannot be fetched.
        MissingDependencyError: A package that reads them is not installed.

    References:
        Szegedy et al. (2015), Going Deeper with Convolutions, section 6, for the random crop.
    """
    check_on_corrupt(on_corrupt)
    RandomCrop(crop_area)  # refuses a bad one, whether or not it is used
    if image_size is not None:
        check_image_size(image_size)
    for_many_sizes: dict[str, Any] = {
        "image_size": image_size or DEFAULT_IMAGE_SIZE,
        "on_corrupt": on_corrupt,
        "crop_area": crop_area,
    }
    if isinstance(name_or_path, str):
        if name_or_path in _OF_ONE_SIZE:
            _check_no_image_size(image_size, name_or_path)
            return _OF_ONE_SIZE[name_or_path](on_corrupt)
        if name_or_path in _OF_MANY_SIZES:
            return _OF_MANY_SIZES[name_or_path](**for_many_sizes)
        if name_or_path.startswith(HUB_PREFIX):
            return load_hub_dataset(name_or_path.removeprefix(HUB_PREFIX), **for_many_sizes)
        if _is_unknown_name(name_or_path):
            raise _unknown(name_or_path)
    path = Path(name_or_path)
    if is_cifar_archive(path):
        _check_no_image_size(image_size, str(path))
        return load_cifar_archive(path)
    if is_image_folder(path):
        return load_image_folder(path, **for_many_sizes)
    if _is_folder_without_parquet(path):
        raise DataError(
            f"`path` (='{path}') holds no data set of a known layout; it must hold `train/<class>/` and `val/<class>/` "
            "with image files, or `train-*.parquet` and `test-*.parquet`, or what an archive of CIFAR unpacks to."
        )
    return load_parquet_folder(path, image_size=image_size, on_corrupt=on_corrupt, crop_area=crop_area)


def _check_no_image_size(image_size: int | None, name: str) -> None:
    if image_size is not None:
        raise ValueError(
            f"`image_size` (={image_size}) is for images of many sizes, and those of '{name}' have one; leave it out."
        )


def _is_folder_without_parquet(path: Path) -> bool:
    try:
        folder = path.expanduser()
        return folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet"))
    except (OSError, RuntimeError):  # whoever reads the path says what is wrong with it
        return False


def _is_unknown_name(text: str) -> bool:
    if text.startswith("~") or Path(text).name != text:
        return False
    # Unlike `os.path`, `Path` raises an error for a name that is too long, and takes an empty one for a folder.
    return not os.path.exists(text)  # noqa: PTH110


def _unknown(name: str) -> ValueError:
    close = get_close_matches(name.lower(), list_datasets(), n=1)
    way_out = f"did you mean '{close[0]}'?" if close else "pass a name, the path of a folder, or hub:owner/name."
    return ValueError(
        f"`name_or_path` (='{name}') is neither a data set of revnet ({', '.join(list_datasets())}) nor a path; "
        f"{way_out}"
    )
