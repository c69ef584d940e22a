"""A plain folder of classes, `<class>/*.jpg` without `train` and `test`, which is divided by the names of the files."""

import os
import unicodedata
from hashlib import blake2b
from pathlib import Path

from revnet._image_files import class_folders, image_files, loose_images, part_among_classes
from revnet._paths import expand_user
from revnet.data.decoding.corrupt import DEFAULT_IMAGE_SIZE, OnCorrupt
from revnet.data.decoding.crop import CenterCrop, RandomResizedCrop
from revnet.data.sources.image_folder import class_files, name_of_folder, split_of_classes, warn_of_loose_images
from revnet.data.splits.image_dataset import Division, ImageDataset
from revnet.errors import DataError


def load_plain_folder(
    path: str | Path,
    *,
    image_size: int = DEFAULT_IMAGE_SIZE,
    on_corrupt: OnCorrupt = "stop",
    crop_area: tuple[float, float] = (0.08, 1.0),
    seed: int | None = 0,
    name: str | None = None,
) -> ImageDataset:
    """Load a data set from a folder that holds a folder of images for each class, and divide it.

    A fifth of the images of each class, rounded and at least one, are the test images. Which ones depends only on
    `seed` and on the names of the files within the folder, so that the same folder is divided alike wherever it lies.
    Otherwise the folder is read like the `train` of `load_image_folder`.

    Args:
        path: The folder; `~` is the home directory.
        image_size: Height and width of the decoded images.
        on_corrupt: Handling of an image that cannot be decoded: "stop" raises a DataError that names the image,
            "skip" leaves the image out of its batch and logs it once.
        crop_area: Smallest and largest share of a training image that a random crop keeps.
        seed: Seed of the division. None does not divide: all images are in `train` and in `test`.
        name: Name of the data set; by default the name of the folder.

    Raises:
        ValueError: An option is out of range.
        DataError: There are no class folders, a class has fewer than two images, or a folder is named like a part of a
            data set.
        MissingDependencyError: Pillow is not installed.
    """
    try:
        folder = expand_user(path)
        classes = _find_classes(folder)
        files = class_files(classes)
    except OSError as error:  # no permission
        raise DataError(f"`path` (='{path}') cannot be opened: {error}; pass a folder that can be read.") from error
    train, test = dict(enumerate(files.values())), dict(enumerate(files.values()))
    division = None
    if seed is not None:
        keys = _keys(classes, files)
        train, test = _divide(classes, files, keys, seed)
        division = Division(seed, _fingerprint(keys))
    return ImageDataset(
        name=name or name_of_folder(folder),
        train=split_of_classes(train, image_size, RandomResizedCrop(crop_area), on_corrupt),
        test=split_of_classes(test, image_size, CenterCrop(), on_corrupt),
        class_names=tuple(files),
        division=division,
    )


def fingerprint_folder(path: str | Path) -> str:
    """Return the fingerprint of the names of all files in a folder of classes, as in its `Division`.

    Raises:
        DataError: The folder cannot be read.
    """
    try:
        classes = class_folders(expand_user(path))
        return _fingerprint(_keys(classes, {name: sorted(image_files(place)) for name, place in classes.items()}))
    except OSError as error:  # no permission
        raise DataError(f"`path` (='{path}') cannot be opened: {error}; pass a folder that can be read.") from error


def _find_classes(folder: Path) -> dict[str, Path]:
    classes = class_folders(folder)
    part = part_among_classes(classes)
    if part is not None:
        raise DataError(
            f"'{folder}' has the folder '{part}' but not 'train'; name the folders of its parts 'train' and 'test', "
            f"or, if '{part}' is a class, give that folder another name."
        )
    loose = loose_images(folder)
    if not classes:
        raise DataError(
            f"`path` (='{folder}') holds images but no folder for each class; move the images of each class to a "
            "folder with its name."
        )
    warn_of_loose_images(folder, loose)
    return classes


def _divide(
    classes: dict[str, Path], files: dict[str, list[str]], keys: dict[str, bytes], seed: int
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return the training and the test files of each label."""
    train, test = {}, {}
    for label, (name, members) in enumerate(files.items()):
        if len(members) < 2:
            raise DataError(
                f"'{classes[name]}' holds a single image, and a class needs two or more, to train and to test on "
                f"different images; add images of '{name}', or remove the folder."
            )
        num_test = max(1, (2 * len(members) + 5) // 10)
        ranked = sorted(members, key=lambda file: blake2b(b"%d\n%b" % (seed, keys[file])).digest())
        held_out = set(ranked[:num_test])
        train[label] = [file for file in members if file not in held_out]
        test[label] = [file for file in members if file in held_out]
    return train, test


def _fingerprint(keys: dict[str, bytes]) -> str:
    return blake2b(b"\0".join(sorted(keys.values())), digest_size=16).hexdigest()


def _keys(classes: dict[str, Path], files: dict[str, list[str]]) -> dict[str, bytes]:
    return {file: _key(name, classes[name], file) for name, members in files.items() for file in members}


def _key(class_name: str, class_folder: Path, file: str) -> bytes:
    """Return the class and the name of a file within the folder of the class, the same on any machine."""
    within = class_name + file.removeprefix(str(class_folder)).replace(os.sep, "/")
    # macOS stores the letter ü as two characters in some file systems, and other systems as one.
    return os.fsencode(unicodedata.normalize("NFC", within))
