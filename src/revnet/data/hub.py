"""Data sets of the Hugging Face hub that are too large to download first: ImageNet, or any other by its address."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from revnet.data._base import ImageDataset
from revnet.data._batch import DEFAULT_IMAGE_SIZE, OnCorrupt, check_image_size, check_on_corrupt
from revnet.data._crop import AbstractCrop, CentreCrop, RandomCrop
from revnet.data._optional import require
from revnet.data._rows import BUFFER_SIZE, AbstractRows, Order, Row
from revnet.data._stream_split import StreamSplit
from revnet.errors import DataError

HUB_PREFIX = "hub:"

_TESTS = ("test", "validation", "valid", "val")
"""What the test split may be called; the first that has labels is taken."""

_IMAGENET = "ILSVRC/imagenet-1k"


def load_imagenet(
    *,
    image_size: int = DEFAULT_IMAGE_SIZE,
    on_corrupt: OnCorrupt = "stop",
    crop_area: tuple[float, float] = (0.08, 1.0),
) -> ImageDataset:
    """ImageNet-1k: 1,281,167 colour images for training and the 50,000 for validation as the test split, 1,000 classes.

    The images come over the network, epoch after epoch. With a copy on disk, `load_image_folder` reads it without.
    The data set is gated: the first use needs an account that has accepted its terms, see `load_hub_dataset`.

    Args and errors: as of `load_hub_dataset`.

    References:
        Russakovsky et al. (2015), ImageNet Large Scale Visual Recognition Challenge.
    """
    # Its `test` has no labels.
    return _load(_IMAGENET, "imagenet", ("validation",), image_size, on_corrupt, crop_area)


def load_hub_dataset(
    repository: str,
    *,
    image_size: int = DEFAULT_IMAGE_SIZE,
    on_corrupt: OnCorrupt = "stop",
    crop_area: tuple[float, float] = (0.08, 1.0),
) -> ImageDataset:
    """Stream a data set from the hub: nothing is downloaded before it is wanted, and nothing is kept.

    It must have a split called `train` and one called `test`, `validation`, `valid` or `val`, with one column of images
    and one of classes that have names, and its card must tell how many images there are.

    Args:
        repository: Its address, `owner/name`.
        image_size: Height and width that images are brought to.
        on_corrupt: What to do about an image that cannot be decoded: "stop" raises a DataError, "skip" leaves it out of
            its batch and says so once.
        crop_area: Least and largest share of a training image that a random crop takes.

    Raises:
        ValueError: `repository` is no such address, or an option is out of range.
        DataError: The hub cannot be reached, the data set is not there, is gated, or is of another kind.
        MissingDependencyError: Hugging Face `datasets` or Pillow is not installed.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"`repository` (='{repository}') must be an address on the Hugging Face hub; pass owner/name.")
    return _load(repository, repository.rpartition("/")[2], _TESTS, image_size, on_corrupt, crop_area)


class HubRows(AbstractRows):
    """The rows of a split on the hub.

    Args:
        repository: Where it is, for messages.
        rows: The split, as `datasets` streams it, with images not decoded.
        image_column: Where the images are.
        label_column: Where the classes are.
    """

    def __init__(self, repository: str, rows: Any, image_column: str, label_column: str) -> None:
        self._repository = repository
        self._rows = rows
        self._image_column = image_column
        self._label_column = label_column

    @property
    def num_shards(self) -> int:
        """Files that the split consists of."""
        return int(self._rows.num_shards)

    def read(self, order: Order | None, worker: int, num_workers: int) -> Iterator[Row]:
        """The rows of this worker's share of the files, which `datasets` finds out by itself.

        Raises:
            DataError: The network fails for longer than `datasets` tries again.
        """
        rows = self._rows
        if order is not None:
            # A seed for each epoch, and not `set_epoch`, which would shuffle a stream that is to keep its order.
            rows = rows.shuffle(seed=int(order.of_shards().integers(2**32)), buffer_size=BUFFER_SIZE)
        try:
            for number, row in enumerate(rows):
                image = row[self._image_column] or {}
                where = image.get("path") or f"image {number} of worker {worker}"
                yield Row(_encoded(image), row[self._label_column], f"'{where}' in '{self._repository}'")
        except Exception as error:
            raise _broke_off(self._repository, error) from error


def _load(
    repository: str,
    name: str,
    tests: tuple[str, ...],
    image_size: int,
    on_corrupt: OnCorrupt,
    crop_area: tuple[float, float],
) -> ImageDataset:
    check_image_size(image_size)
    check_on_corrupt(on_corrupt)
    crop = RandomCrop(crop_area)
    datasets = require("datasets", package="Hugging Face `datasets`", purpose=f"streaming `{repository}`")
    splits = _open(datasets, repository)
    tests = tuple(part for part in tests if part in splits)
    if "train" not in splits or not tests:
        raise DataError(
            f"'{repository}' has the splits {', '.join(splits)}; it must have `train` and one of {', '.join(_TESTS)}."
        )
    features = splits["train"].features
    image_column, label_column = _find_columns(datasets, repository, features or {})
    test = next((part for part in tests if _has_labels(repository, splits[part], label_column)), None)
    if test is None:
        raise DataError(f"'{repository}' keeps the labels of {' and '.join(tests)} secret; take another data set.")
    class_names = tuple(features[label_column].names)

    def stream(part: str, crop: AbstractCrop) -> StreamSplit:
        rows = splits[part].select_columns([image_column, label_column])
        rows = rows.cast_column(image_column, datasets.Image(decode=False))
        return StreamSplit(
            HubRows(repository, rows, image_column, label_column),
            num_images=_num_images(repository, splits[part], part),
            num_classes=len(class_names),
            image_size=image_size,
            crop=crop,
            on_corrupt=on_corrupt,
        )

    return ImageDataset(name, stream("train", crop), stream(test, CentreCrop()), class_names)


def _open(datasets: ModuleType, repository: str) -> Any:
    """The splits, by name."""
    package, purpose = "Hugging Face `datasets`", f"streaming `{repository}`"
    hub = require("huggingface_hub", package=package, purpose=purpose)
    errors = require("huggingface_hub.errors", package=package, purpose=purpose)
    try:
        # A first request with a time limit: without a network, `datasets` tries for 23 seconds.
        if hub.HfApi().dataset_info(repository, timeout=10).gated:
            hub.HfApi().auth_check(repository, repo_type="dataset")
        return datasets.load_dataset(repository, streaming=True)
    except errors.GatedRepoError as error:
        raise DataError(
            f"'{repository}' is gated: accept its terms at https://huggingface.co/datasets/{repository}, make a token "
            "at https://huggingface.co/settings/tokens, and log in with `hf auth login` (or set HF_TOKEN)."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"'{repository}' is not a data set on the Hugging Face hub that you may see; check its address, or log in "
            "with `hf auth login`."
        ) from error
    except Exception as error:  # besides OSError, those of the HTTP library beneath, which changes between versions
        raise DataError(
            f"'{repository}' cannot be streamed from the Hugging Face hub: {_first_line(error)}; check the network, or "
            "pass the path of a copy on disk."
        ) from error


def _find_columns(datasets: ModuleType, repository: str, features: dict[str, Any]) -> tuple[str, str]:
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if "fine_label" in labels:  # CIFAR-100 has coarse ones too
        labels = ["fine_label"]
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"'{repository}' has the columns {', '.join(features) or '(not told)'}; it must have one of images and one "
            f"of named classes, and has {len(images)} and {len(labels)}; pass a data set for image classification."
        )
    return images[0], labels[0]


def _has_labels(repository: str, rows: Any, label_column: str) -> bool:
    """Whether the first image has a label; asked now, since the test split may be wanted in days only."""
    try:
        first: dict[str, Any] = next(iter(rows.select_columns([label_column])), {})
    except Exception as error:
        raise _broke_off(repository, error) from error
    label = first.get(label_column)
    return label is not None and label >= 0


def _num_images(repository: str, rows: Any, part: str) -> int:
    info = (rows.info.splits or {}).get(part)
    if info is None or not info.num_examples:
        raise DataError(
            f"the card of '{repository}' does not tell how many images `{part}` has, without which no epoch can be "
            "planned; download the data set, and pass its folder."
        )
    return int(info.num_examples)


def _encoded(image: dict[str, Any]) -> bytes:
    if image.get("bytes"):
        return bytes(image["bytes"])
    path = image.get("path") or ""
    # Data sets of single files give addresses. A path on this machine was not meant for us.
    if "://" not in path or path.startswith(("file:", "local:")):
        return b""
    fsspec = require("fsspec", package="Hugging Face `datasets`", purpose="reading images from the hub")
    with fsspec.open(path, "rb") as file:
        return bytes(file.read())


def _broke_off(repository: str, error: Exception) -> DataError:
    return DataError(f"the stream of '{repository}' broke off: {_first_line(error)}; check the network, and resume.")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
