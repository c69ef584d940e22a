"""Data of the user's own: a LightningDataModule, by its import path."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from revnet.data.loading._position import Position
from revnet.training.classification.config import TrainConfig
from revnet.training.import_path import UserCodeError, call_object, import_object

Batch = tuple[Tensor, Tensor]


class OwnBatches(Iterable[Batch]):
    """The training batches of a user's loader, with a position that can be saved.

    The order is drawn from PyTorch's generator, seeded for each epoch. A resumed run leaves out the batches that came
    before, after reading them again, so it sees the same ones if the loader's order depends on that generator, or on
    the epoch that its sampler was set to.

    Args:
        loader: The user's loader.
        num_updates: Number of updates in an epoch.
        num_parts: Number of batches for each update.
        seed: Seed of the orders.
    """

    batch_sampler = None  # Lightning looks for this too where there is a `sampler`

    def __init__(self, loader: Any, num_updates: int, num_parts: int, seed: int) -> None:
        self._loader = loader
        self._num_batches = num_updates * num_parts
        self._num_parts = num_parts
        self._seed = seed
        self._position = Position(range(num_updates + 1), num_parts, {"seed": seed, "num_batches": self._num_batches})

    @property
    def sampler(self) -> "OwnBatches":
        """The object whose epoch Lightning sets: the batches themselves."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, here and in the sampler of the loader."""
        self._position.set_epoch(epoch)
        set_epoch = getattr(getattr(self._loader, "sampler", None), "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return self._position.save()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the position."""
        self._position.load(state_dict)

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        num_left_out = self._position.begin() * self._num_parts
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed + self._position.epoch)
            batches = iter(self._loader)
            first = list(islice(batches, 1))  # a sampler draws its order when it is first read
        for number, batch in enumerate(islice(chain(first, batches), self._num_batches)):
            if number >= num_left_out:
                self._position.advance()
                yield batch[0], batch[1]


@dataclass(frozen=True, eq=False)
class OwnData:
    """Data of the user's own, ready to be read."""

    name: str
    """Name of the data, in logs and file names."""
    class_names: tuple[str, ...]
    """Names of the classes."""
    image_shape: tuple[int, int, int]
    """Shape of an image, (C, H, W)."""
    is_encoded: bool
    """Whether images are uint8 pixels; otherwise they are floating point, and go into the network as they are."""
    batch_size: int
    """Images per batch of the training loader."""
    training: Any
    """Training loader."""
    validation: Any | None
    """Validation loader, if there is one."""
    test: Any
    """Test loader, or the validation loader if there is none."""
    has_test: bool
    """Whether there is a test loader."""


def load_own_data(config: TrainConfig) -> OwnData:
    """Make the data module that `config.data` names, set it up, and look at its first batch.

    A function or class is called with `batch_size`, `num_workers` and `seed` if it takes them.

    Raises:
        ValueError: The object does not exist, is not a data module, or its batches are not images and labels.
        UserCodeError: The user's code failed.
    """
    made = import_object(config.data, f"`data` (={config.data!r})")
    if not isinstance(made, LightningDataModule) and callable(made):
        made = call_object(
            "data",
            config.data,
            made,
            batch_size=config.batch_size // config.accumulate,
            num_workers=config.num_workers or 0,
            seed=config.seed,
        )
    if not isinstance(made, LightningDataModule):
        raise ValueError(
            f"`data` (={config.data!r}) must be a LightningDataModule, or a function that returns one; got "
            f"{type(made).__name__}."
        )
    try:
        made.prepare_data()
        made.setup("fit")
        made.setup("test")
        training = made.train_dataloader()
        validation = _loader(made, "val_dataloader")
        test = _loader(made, "test_dataloader")
        with torch.random.fork_rng(devices=[]):
            batch = next(iter(training))
    except Exception as error:
        raise UserCodeError(f"`data` (={config.data!r}) failed to load its data.") from error
    images, labels = _check_batch(config.data, batch)
    if test is None and validation is None:
        raise ValueError(
            f"`data` (={config.data!r}) must have a `test_dataloader` or a `val_dataloader`, to measure the "
            "accuracy on."
        )
    return OwnData(
        name=config.data.rpartition(":")[2],
        class_names=_class_names(config.data, made, labels),
        image_shape=(images.shape[1], images.shape[2], images.shape[3]),
        is_encoded=images.dtype == torch.uint8,
        batch_size=len(images),
        training=training,
        validation=validation,
        test=validation if test is None else test,
        has_test=test is not None,
    )


def _loader(module: LightningDataModule, name: str) -> Any | None:
    is_own = getattr(type(module), name) is not getattr(LightningDataModule, name)
    return getattr(module, name)() if is_own else None


def _check_batch(data: str, batch: Any) -> Batch:
    is_pair = isinstance(batch, list | tuple) and len(batch) >= 2 and all(isinstance(x, Tensor) for x in batch[:2])
    if is_pair and batch[0].ndim == 4 and batch[1].ndim == 1 and not batch[1].is_floating_point():
        return batch[0], batch[1]
    got = (
        [f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__ for x in batch[:2]]
        if (isinstance(batch, list | tuple))
        else type(batch).__name__
    )
    raise ValueError(
        f"`data` (={data!r}) must yield batches of images (B, C, H, W) and labels (B,) of integers; got {got}."
    )


def _class_names(data: str, module: LightningDataModule, labels: Tensor) -> tuple[str, ...]:
    names, num_classes = getattr(module, "class_names", None), getattr(module, "num_classes", None)
    if names is None and isinstance(num_classes, int):
        names = map(str, range(num_classes))
    if names is None:
        raise ValueError(f"`data` (={data!r}) must have an attribute `num_classes`, or `class_names`.")
    class_names = tuple(map(str, names))
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(class_names):
        raise ValueError(
            f"`data` (={data!r}) has labels from {int(labels.min())} to {int(labels.max())}, which must be below the "
            f"number of classes, {len(class_names)}."
        )
    return class_names
