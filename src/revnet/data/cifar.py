"""CIFAR-10, from the Hugging Face hub."""

from pathlib import Path
from types import ModuleType

from revnet.data._base import ImageDataset
from revnet.data._optional import require
from revnet.data.parquet_folder import load_parquet_folder
from revnet.errors import DataError

_REPOSITORY = "uoft-cs/cifar10"
_FILES = ("plain_text/train-00000-of-00001.parquet", "plain_text/test-00000-of-00001.parquet")


def load_cifar10() -> ImageDataset:
    """CIFAR-10: 50,000 colour images for training and 10,000 for testing, 32x32, ten classes.

    The first call downloads some 140 MB into the cache of the hub's client (`HF_HOME`); later calls need no network.
    With a copy of the files at hand, `load_parquet_folder` reads the same data set without the hub.

    Raises:
        DataError: The hub cannot be reached and the files are not in its cache.
        MissingDependencyError: Hugging Face `datasets` is not installed.

    References:
        Krizhevsky (2009), Learning Multiple Layers of Features from Tiny Images.
    """
    # The client beneath `datasets`, which comes with it: without a network it gives up at once, where
    # `datasets.load_dataset` tries for 23 seconds, and the files it fetches need no second copy as Arrow tables.
    hub = require("huggingface_hub", package="Hugging Face `datasets`", purpose="the data set `cifar10`")
    try:
        folder = _fetch(hub)
    except Exception as error:  # besides OSError, those of the HTTP library beneath, which changes between versions
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise DataError(
            f"`cifar10` cannot be fetched from the Hugging Face hub ({_REPOSITORY}): {reason}; "
            "download its parquet files where there is a network, and pass their folder in place of the name."
        ) from error
    return load_parquet_folder(folder, name="cifar10")


def _fetch(hub: ModuleType) -> Path:
    """The folder of the files in the hub's cache; downloads those that are not there."""
    cached = [hub.try_to_load_from_cache(_REPOSITORY, file, repo_type="dataset") for file in _FILES]
    if all(isinstance(file, str) for file in cached):
        return Path(cached[0]).parent
    # A first request with a time limit, for `snapshot_download` has none where a firewall swallows its packets.
    hub.HfApi().dataset_info(_REPOSITORY, timeout=10)
    snapshot = hub.snapshot_download(_REPOSITORY, repo_type="dataset", allow_patterns=list(_FILES))
    return Path(snapshot, _FILES[0]).parent
