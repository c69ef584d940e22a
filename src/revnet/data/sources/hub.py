"""Streaming of large data sets from the Hugging Face hub: ImageNet, or any other by its address."""

import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from revnet.data._require import require
from revnet.data.decoding.corrupt import DEFAULT_IMAGE_SIZE, OnCorrupt, check_image_size, check_on_corrupt
from revnet.data.decoding.crop import AbstractCrop, CenterCrop, RandomResizedCrop
from revnet.data.splits.image_dataset import ImageDataset
from revnet.data.splits.rows import BUFFER_SIZE, AbstractRows, Order, Row
from revnet.data.splits.stream_split import StreamSplit
from revnet.errors import DataError

HUB_PREFIX = "hub:"

_TESTS = ("test", "validation", "valid", "val")
"""Possible names of the test split; the first one with labels is used."""

_MOST_IMAGE_BYTES = 2**30
_IMAGENET = "ILSVRC/imagenet-1k"


def load_imagenet(
    *,
    image_size: int = DEFAULT_IMAGE_SIZE,
    on_corrupt: OnCorrupt = "stop",
    crop_area: tuple[float, float] = (0.08, 1.0),
) -> ImageDataset:
    """Load ImageNet-1k: 1,281,167 color images for training, the 50,000 validation images for testing, 1,000 classes.

    The images are streamed over the network in every epoch; `load_image_folder` reads a copy on disk instead. The data
    set is gated: the first use needs an account that has accepted its terms, see `load_hub_dataset`.

    Arguments and errors are as in `load_hub_dataset`.

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
    """Stream a data set from the hub: images are downloaded when they are needed, and are not kept.

    The data set must have a split called `train` and one called `test`, `validation`, `valid` or `val`, with one column
    of images and one of named classes, and its card must state the number of images.

    Args:
        repository: Address of the data set, `owner/name`.
        image_size: Height and width of the decoded images.
        on_corrupt: Handling of an image that cannot be decoded: "stop" raises a DataError, "skip" leaves the image
            out of its batch and logs it once.
        crop_area: Smallest and largest share of a training image that a random crop keeps.

    Raises:
        ValueError: `repository` is not of the form `owner/name`, or an option is out of range.
        DataError: The hub cannot be reached, or the data set does not exist, is gated, or is of another kind.
        MissingDependencyError: Hugging Face `datasets` or Pillow is not installed.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ValueError(f"`repository` (='{repository}') must be an address on the Hugging Face hub; pass owner/name.")
    return _load(repository, repository.rpartition("/")[2], _TESTS, image_size, on_corrupt, crop_area)


class HubRows(AbstractRows):
    """The rows of a split on the hub.

    Args:
        repository: Address of the data set, for messages.
        rows: The split as `datasets` streams it, with encoded images.
        image_column: Name of the column of images.
        label_column: Name of the column of classes.
    """

    def __init__(self, repository: str, rows: Any, image_column: str, label_column: str) -> None:
        self._repository = repository
        self._rows = rows
        self._image_column = image_column
        self._label_column = label_column

    @property
    def num_shards(self) -> int:
        """Number of files of the split."""
        return int(self._rows.num_shards)

    def read(self, order: Order | None, worker: int, num_workers: int) -> Iterator[Row]:
        """Yield the rows of this worker's share of the files, which `datasets` determines itself.

        Raises:
            DataError: The network fails for longer than `datasets` retries.
        """
        rows = self._rows
        if order is not None:
            # A seed per epoch instead of `set_epoch`, which would shuffle a stream that must keep its order.
            rows = rows.shuffle(seed=int(order.shard_generator().integers(2**32)), buffer_size=BUFFER_SIZE)
        try:
            for number, row in enumerate(rows):
                image = row[self._image_column] or {}
                name = image.get("path") or f"image {number} of worker {worker}"
                yield Row(_encoded(image), row[self._label_column], f"'{name}' in '{self._repository}'")
        except Exception as error:
            raise _interrupted(self._repository, error) from error


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
    crop = RandomResizedCrop(crop_area)
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
        raise DataError(f"'{repository}' does not publish the labels of {' and '.join(tests)}; use another data set.")
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

    return ImageDataset(name, stream("train", crop), stream(test, CenterCrop()), class_names)


def _open(datasets: ModuleType, repository: str) -> Any:
    """Return the splits, by name."""
    package, purpose = "Hugging Face `datasets`", f"streaming `{repository}`"
    hub = require("huggingface_hub", package=package, purpose=purpose)
    errors = require("huggingface_hub.errors", package=package, purpose=purpose)
    try:
        # A first request with a time limit, since `datasets` tries for 23 seconds without a network.
        if hub.HfApi().dataset_info(repository, timeout=10).gated:
            hub.HfApi().auth_check(repository, repo_type="dataset")
        return datasets.load_dataset(repository, streaming=True)
    except errors.GatedRepoError as error:
        raise DataError(
            f"'{repository}' is gated: accept its terms at https://huggingface.co/datasets/{repository}, create a "
            "token at https://huggingface.co/settings/tokens, and log in with `hf auth login` (or set HF_TOKEN)."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"'{repository}' is not a data set on the Hugging Face hub that you can access; check its address, or log "
            "in with `hf auth login`."
        ) from error
    except Exception as error:  # OSError, and errors of the HTTP library, which differ between versions
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
            f"'{repository}' has the columns {', '.join(features) or '(unknown)'}; it must have one of images and one "
            f"of named classes, but has {len(images)} and {len(labels)}; pass a data set for image classification."
        )
    return images[0], labels[0]


def _has_labels(repository: str, rows: Any, label_column: str) -> bool:
    """Return whether the first image has a label; checked at once, since the test split may be used days later."""
    try:
        first: dict[str, Any] = next(iter(rows.select_columns([label_column])), {})
    except Exception as error:
        raise _interrupted(repository, error) from error
    label = first.get(label_column)
    return label is not None and label >= 0


def _num_images(repository: str, rows: Any, part: str) -> int:
    info = (rows.info.splits or {}).get(part)
    if info is None or not info.num_examples:
        raise DataError(
            f"the card of '{repository}' does not state how many images `{part}` has, which an epoch needs; "
            "download the data set, and pass its folder."
        )
    return int(info.num_examples)


def _encoded(image: dict[str, Any]) -> bytes:
    if image.get("bytes"):
        return bytes(image["bytes"])
    path = image.get("path") or ""
    # Data sets of single files contain URLs. Local paths are ignored: the data set must not read from this machine.
    if "://" not in path or path.startswith(("file:", "local:")):
        return b""
    fsspec = require("fsspec", package="Hugging Face `datasets`", purpose="reading images from the hub")
    with fsspec.open(path, "rb") as file:
        return bytes(file.read(_MOST_IMAGE_BYTES))  # what is longer is cut off, and cannot be decoded


def _interrupted(repository: str, error: Exception) -> DataError:
    return DataError(
        f"the stream of '{repository}' was interrupted: {_first_line(error)}; check the network, and resume."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
