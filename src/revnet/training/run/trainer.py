"""Lightning's Trainer, set up to print nothing and to stop cleanly at a signal."""

import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from revnet.training.atomic_file import atomic_path
from revnet.training.device import find_device
from revnet.training.run.checkpoint import read_checkpoint
from revnet.training.run.precision import precision_arguments
from revnet.training.run.updates import update_arguments
from revnet.training.settings.run_config import AbstractRunConfig

_IRRELEVANT_WARNINGS = (
    r".*does not have many workers",  # the images are in memory: a worker would only copy them
    r"You defined a `validation_step` but have no `val_dataloader`",  # no validation: the paper's protocol
    r"Found .* module\(s\) in eval mode at the start of training",  # frozen batch norms
    r"Detected call of `lr_scheduler.step\(\)` before",  # a gradient scaler left out the first updates
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 calls it, PyTorch 2.13 warns
)


class AtomicCheckpointIO(CheckpointIO):
    """Plugin that writes a checkpoint whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint`; if the process is killed while writing, the previous file remains."""
        with atomic_path(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint without executing anything in it."""
        return read_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


class Stopped(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came while Lightning was running."""

    def __init__(self, signal_number: int) -> None:
        super().__init__()
        self.signal_number = signal_number


def make_trainer(
    config: AbstractRunConfig,
    callbacks: list[Callback],
    folder: Path,
) -> Trainer:
    """Return a Trainer that writes nothing but what `callbacks` write."""
    precision = precision_arguments(config, find_device(config.device).type)
    with quiet():
        return Trainer(
            max_epochs=config.epochs,
            **update_arguments(config),
            accelerator=config.device,
            precision=precision.get("precision"),
            devices=1,  # the loader's sampler does not split the images among processes
            use_distributed_sampler=False,
            callbacks=callbacks,
            # One process: a scheduler's environment variables (SLURM's) must not make it wait for others.
            plugins=[AtomicCheckpointIO(), LightningEnvironment(), *precision.get("plugins", ())],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )


def fit(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    """Run `trainer.fit`, and restore the signal handler afterwards.

    Raises:
        Stopped: Ctrl-C or SIGTERM came.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        with quiet():
            trainer.fit(*args, **kwargs)
    except SIGTERMException as error:
        raise Stopped(signal.SIGTERM) from error
    except SystemExit as error:
        # Lightning exits Python at Ctrl-C, and ignores Ctrl-C from then on.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        raise Stopped(signal.SIGINT) from error
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence Lightning's advertisements, and the advice that does not apply here."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            for message in _IRRELEVANT_WARNINGS:
                warnings.filterwarnings("ignore", message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
