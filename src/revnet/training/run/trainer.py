"""Lightning's Trainer, set up to print nothing and to stop cleanly at a signal."""

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, Trainer

from revnet.training.device import find_device
from revnet.training.run.checkpoint_io import AtomicCheckpointIO
from revnet.training.settings.run_config import AbstractRunConfig

_IRRELEVANT_WARNINGS = (
    r".*does not have many workers",  # the images are in memory: a worker would only copy them
    r"You defined a `validation_step` but have no `val_dataloader`",  # no validation: the paper's protocol
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 calls it, PyTorch 2.13 warns
)


def make_trainer(
    config: AbstractRunConfig,
    callbacks: list[Callback],
    folder: Path,
) -> Trainer:
    """Return a Trainer that writes nothing but what `callbacks` write."""
    precision: Any = config.precision
    with quiet():
        return Trainer(
            max_epochs=config.epochs,
            gradient_clip_val=config.max_grad_norm,
            accelerator=config.device,
            precision=precision,
            devices=1,  # the loader's sampler does not split the images among processes
            use_distributed_sampler=False,
            callbacks=callbacks,
            # One process: a scheduler's environment variables (SLURM's) must not make it wait for others.
            plugins=[make_checkpoint_io(config), LightningEnvironment()],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )


def make_checkpoint_io(config: AbstractRunConfig) -> AtomicCheckpointIO:
    """Return the plugin that writes checkpoints: in the background on a GPU, unless the settings say otherwise."""
    is_async = config.async_save
    return AtomicCheckpointIO(is_async=find_device(config.device).type == "cuda" if is_async is None else is_async)


def fit(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    """Run `trainer.fit`.

    Raises:
        KeyboardInterrupt: A signal came that did not wait for a checkpoint.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        with quiet():
            trainer.fit(*args, **kwargs)
    except SystemExit as error:
        # Lightning exits Python at Ctrl-C, and ignores Ctrl-C from then on.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        raise error.__context__ from None
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
