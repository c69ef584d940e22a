"""Data sets by name or path."""

import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from revnet._checks import check_count, check_path
from revnet._image_files import explain_link, is_image_folder, is_plain_folder
from revnet._paths import expand_user
from revnet.data.decoding.corrupt import DEFAULT_IMAGE_SIZE, OnCorrupt, check_image_size, check_on_corrupt
from revnet.data.decoding.crop import RandomResizedCrop
from revnet.data.sources.cifar import load_cifar10, load_cifar100
from revnet.data.sources.cifar_archive import is_cifar_archive, load_cifar_archive
from revnet.data.sources.digits import load_digits
from revnet.data.sources.hub import HUB_PREFIX, load_hub_dataset, load_imagenet
from revnet.data.sources.image_folder import load_image_folder
from revnet.data.sources.parquet_folder import load_parquet_folder
from revnet.data.sources.plain_folder import load_plain_folder
from revnet.data.splits.image_dataset import ImageDataset
from revnet.errors import DataError

_FIXED_SIZE: dict[str, Callable[[OnCorrupt], ImageDataset]] = {
    "cifar10": lambda on_corrupt: load_cifar10(on_corrupt=on_corrupt),
    "cifar100": lambda on_corrupt: load_cifar100(on_corrupt=on_corrupt),
    "digits": lambda _: load_digits(),
}
_ANY_SIZE: dict[str, Callable[..., ImageDataset]] = {
    "imagenet": load_imagenet,
}


def list_datasets() -> list[str]:
    """Return the names that `load_dataset` knows, sorted."""
    return sorted((*_FIXED_SIZE, *_ANY_SIZE))


def load_dataset(
    name_or_path: str | Path,
    *,
    image_size: int | None = None,
    on_corrupt: OnCorrupt = "stop",
    crop_area: tuple[float, float] = (0.08, 1.0),
    seed: int | None = 0,
) -> ImageDataset:
    """Load a data set by name or path.

    At a path, the layout is detected:

    * one of the archives of CIFAR-10 or CIFAR-100, or the folder it unpacks to, see `load_cifar_archive`;
    * a folder of image files, `train/<class>/*.jpg` and `val/<class>/*.jpg`, see `load_image_folder`;
    * a folder of classes, `<class>/*.jpg`, a fifth of which become the test images, see `load_plain_folder`;
    * a folder in the hub's layout, `train-*.parquet` and `test-*.parquet`, see `load_parquet_folder`.

    Images of one size are loaded into memory. Images of varying size (image files, ImageNet, everything streamed with
    `hub:`, and parquet files if `image_size` is given) are read as needed and decoded to RGB of `image_size` x
    `image_size`. A training image is cropped at random, differently in each epoch: the area of the crop is uniform
    between the shares in `crop_area`, its aspect ratio log-uniform in 3/4..4/3. A test image is cropped in the center:
    its shorter side is resized to `image_size` / 0.875, and the border is cut off.

    A known name takes precedence over a folder of the same name; write `./cifar10` for the folder.

    Args:
        name_or_path: A name of `list_datasets()`, an address on the Hugging Face hub such as `hub:owner/name`, or a
            path; `~` is the home directory.
        image_size: Height and width of decoded images of varying size, 224 by default. None keeps the images of
            parquet files at their own size.
        on_corrupt: Handling of an image that cannot be decoded: "stop" raises a DataError that names the image,
            when it is reached; "skip" leaves the image out and logs it once.
        crop_area: Smallest and largest share of a training image that a random crop keeps.
        seed: Seed of the choice of the test images, for a folder of classes. None takes all images for training and
            testing.

    Raises:
        ValueError: `name_or_path` is neither a known name nor a path, an option is out of range, or `image_size` is
            given for images of a fixed size.
        DataError: The data are missing, corrupt, of another layout, or cannot be downloaded.
        MissingDependencyError: A required package is not installed.

    References:
        Szegedy et al. (2015), Going Deeper with Convolutions, section 6, for the random crop.
    """
    check_path("name_or_path", name_or_path, hint=f"one of {', '.join(list_datasets())}, a folder, or hub:owner/name")
    check_on_corrupt(on_corrupt)
    RandomResizedCrop(crop_area)  # raises for a bad argument, whether or not it is used
    if image_size is not None:
        check_image_size(image_size)
    if seed is not None:
        check_count("seed", seed, least=0, most=2**32 - 1)
    options: dict[str, Any] = {
        "image_size": image_size or DEFAULT_IMAGE_SIZE,
        "on_corrupt": on_corrupt,
        "crop_area": crop_area,
    }
    if isinstance(name_or_path, str):
        if name_or_path in _FIXED_SIZE:
            _check_no_image_size(image_size, name_or_path)
            return _FIXED_SIZE[name_or_path](on_corrupt)
        if name_or_path in _ANY_SIZE:
            return _ANY_SIZE[name_or_path](**options)
        if name_or_path.startswith(HUB_PREFIX):
            return load_hub_dataset(name_or_path.removeprefix(HUB_PREFIX), **options)
        if _is_unknown_name(name_or_path):
            raise _unknown(name_or_path)
    path = Path(name_or_path)
    if (fault := explain_link(path)) is not None:
        raise DataError(f"`path` (='{path}') {fault}.")
    if is_cifar_archive(path):
        _check_no_image_size(image_size, str(path))
        return load_cifar_archive(path)
    if is_image_folder(path):
        return load_image_folder(path, **options)
    if is_plain_folder(path):
        return load_plain_folder(path, **options, seed=seed)
    if _is_folder_without_parquet(path):
        raise DataError(
            f"`path` (='{path}') does not hold a data set of a known layout; it must hold a folder of "
            "images for each class, or `train/<class>/` and `val/<class>/` with images, or `train-*.parquet` and "
            "`test-*.parquet`, or the files of a CIFAR archive."
        )
    return load_parquet_folder(path, image_size=image_size, on_corrupt=on_corrupt, crop_area=crop_area)


def _check_no_image_size(image_size: int | None, name: str) -> None:
    if image_size is not None:
        raise ValueError(
            f"`image_size` (={image_size}) is for images of varying size, but the images of '{name}' have one size; "
            "leave it out."
        )


def _is_folder_without_parquet(path: Path) -> bool:
    try:
        folder = expand_user(path)
        return folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet"))
    except OSError:  # reading the path raises an error that explains the problem
        return False


def _is_unknown_name(text: str) -> bool:
    if text.startswith("~") or Path(text).name != text:
        return False
    # Unlike `os.path`, `Path` raises an error for a name that is too long, and treats an empty one as a folder.
    return not os.path.lexists(text)


def _unknown(name: str) -> ValueError:
    close = get_close_matches(name.lower(), list_datasets(), n=1)
    hint = f"did you mean '{close[0]}'?" if close else "pass a name, the path of a folder, or hub:owner/name."
    return ValueError(
        f"`name_or_path` (='{name}') is neither a data set of revnet ({', '.join(list_datasets())}) nor a path; {hint}"
    )
