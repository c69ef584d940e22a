"""CIFAR-10 and CIFAR-100, from the Hugging Face hub."""

from pathlib import Path
from types import ModuleType

from revnet.data._require import require
from revnet.data.decoding.corrupt import OnCorrupt
from revnet.data.sources.parquet_folder import load_parquet_folder
from revnet.data.splits.image_dataset import ImageDataset
from revnet.errors import DataError


def load_cifar10(*, on_corrupt: OnCorrupt = "stop") -> ImageDataset:
    """Load CIFAR-10: 50,000 color images for training and 10,000 for testing, 32x32, ten classes.

    The first call downloads about 140 MB into the cache of the hub's client (`HF_HOME`); later calls need no network.
    `load_parquet_folder` reads a local copy of the same files without the hub, and `load_cifar_archive` reads the
    original archives.

    Args:
        on_corrupt: Handling of an image that cannot be decoded, see `load_parquet_folder`.

    Raises:
        DataError: The hub cannot be reached and the files are not in its cache.
        MissingDependencyError: Hugging Face `datasets` is not installed.

    References:
        Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images.
    """
    return _load("cifar10", "uoft-cs/cifar10", "plain_text", on_corrupt)


def load_cifar100(*, on_corrupt: OnCorrupt = "stop") -> ImageDataset:
    """Load CIFAR-100: like `load_cifar10`, with the fine labels: 100 classes of 500 training and 100 test images."""
    return _load("cifar100", "uoft-cs/cifar100", "cifar100", on_corrupt)


def _load(name: str, repository: str, folder: str, on_corrupt: OnCorrupt) -> ImageDataset:
    # The client that `datasets` is built on and installs: without a network it fails at once, where
    # `datasets.load_dataset` tries for 23 seconds, and its files need no second copy as Arrow tables.
    hub = require("huggingface_hub", package="Hugging Face `datasets`", purpose=f"the data set `{name}`")
    try:
        files = _fetch(hub, repository, [f"{folder}/{part}-00000-of-00001.parquet" for part in ("train", "test")])
    except Exception as error:  # OSError, and errors of the HTTP library, which differ between versions
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise DataError(
            f"`{name}` cannot be fetched from the Hugging Face hub ({repository}): {reason}; "
            "download its parquet files where there is a network, and pass their folder instead of the name."
        ) from error
    return load_parquet_folder(files, on_corrupt=on_corrupt, name=name)


def _fetch(hub: ModuleType, repository: str, files: list[str]) -> Path:
    """Return the folder of the files in the hub's cache, and download missing ones first."""
    cached = [hub.try_to_load_from_cache(repository, file, repo_type="dataset") for file in files]
    if all(isinstance(file, str) for file in cached):
        return Path(cached[0]).parent
    # A first request with a time limit, since `snapshot_download` waits for ever where a firewall drops its packets.
    hub.HfApi().dataset_info(repository, timeout=10)
    snapshot = hub.snapshot_download(repository, repo_type="dataset", allow_patterns=files)
    return Path(snapshot, files[0]).parent
