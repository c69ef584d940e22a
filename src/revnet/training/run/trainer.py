"""Lightning's Trainer, set up to print nothing and to stop cleanly at a signal."""

import logging
import signal
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from revnet.errors import CheckpointError, RevnetError
from revnet.training.device import find_device
from revnet.training.processes.prepare_model import uses_fsdp2
from revnet.training.processes.world import current_world
from revnet.training.run.checkpoint_io import AtomicCheckpointIO
from revnet.training.run.loggers import logger_errors, make_loggers
from revnet.training.run.precision import precision_arguments
from revnet.training.run.sharded_strategy import ShardedStrategy
from revnet.training.run.updates import update_arguments
from revnet.training.settings.run_config import AbstractRunConfig

_IRRELEVANT_WARNINGS = (
    r".*does not have many workers",  # the images are in memory: a worker would only copy them
    r"You defined a `validation_step` but have no `val_dataloader`",  # no validation: the paper's protocol
    r"The number of training batches .* is smaller than the logging interval",  # revnet logs by update itself
    r"FSDP2-wrapped module .* returned a view tensor",  # no task changes the output in place
    r"Found .* module\(s\) in eval mode at the start of training",  # frozen batch norms
    r"Detected call of `lr_scheduler.step\(\)` before",  # a gradient scaler left out the first updates
    r"It is recommended to use `self.log\(",  # times and drift are those of the main process
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning 2.6 calls it, PyTorch 2.13 warns
)

_RESTORES = "lightning.pytorch.trainer.connectors.checkpoint_connector"
_RESTORE_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What loading a state of another structure raises."""


def make_trainer(
    config: AbstractRunConfig,
    callbacks: list[Callback],
    folder: Path,
) -> Trainer:
    """Return a Trainer that writes nothing but what `callbacks` and the loggers of `config` write.

    It trains on the processes of the current world.
    """
    world = current_world()
    is_sharded = uses_fsdp2(config)
    if is_sharded:
        precision: dict[str, Any] = {"precision": "32-true"}  # `fully_shard` has a policy for mixed precision itself
    else:
        precision = precision_arguments(config, find_device(config.device).type)
    with quiet(), logger_errors():
        return Trainer(
            max_epochs=config.epochs,
            **update_arguments(config),
            accelerator=config.device,
            precision=precision.get("precision"),
            devices=world.num_local,
            num_nodes=world.num_nodes,
            strategy=_make_strategy(is_sharded=is_sharded),
            use_distributed_sampler=False,  # the loaders divide the batches among processes
            callbacks=callbacks,
            plugins=[
                AtomicCheckpointIO(is_async=config.async_save),
                _make_environment(),
                *precision.get("plugins", ()),
            ],
            default_root_dir=folder,
            logger=make_loggers(config, folder) or False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )


def _make_strategy(*, is_sharded: bool) -> Strategy | str:
    world = current_world()
    if world.num_processes == 1:
        return "auto"
    if is_sharded:
        return ShardedStrategy(data_parallel_size=world.num_processes, tensor_parallel_size=1)
    # PyTorch has renamed the option.
    names = signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {option: False}
    # Each process keeps the statistics of its own batches. Gradients lie in the buckets that are sent, not in copies.
    return DDPStrategy(**options, gradient_as_bucket_view=True)


def _make_environment() -> ClusterEnvironment:
    # `joined` sets the variables of torchrun under every launcher. With one process, a scheduler's variables (SLURM's)
    # must not make it wait for others.
    return LightningEnvironment() if current_world().num_processes == 1 else TorchElasticEnvironment()


def fit(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
    """Run `trainer.fit`.

    Raises:
        CheckpointError: The state in the checkpoint does not fit the run.
        KeyboardInterrupt: A signal came that did not wait for a checkpoint.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        with quiet(), logger_errors():
            trainer.fit(*args, **kwargs)
    except SystemExit as error:
        # Lightning exits Python at Ctrl-C, and ignores Ctrl-C from then on.
        if not isinstance(error.__context__, KeyboardInterrupt):
            raise
        raise error.__context__ from None
    except _RESTORE_ERRORS as error:
        if isinstance(error, RevnetError) or not _is_restoring(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"`{kwargs.get('ckpt_path')}` does not fit the run ({reason}); delete it to continue from the one before."
        ) from error
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _is_restoring(error: BaseException) -> bool:
    """Return whether `error` was raised while Lightning restored a checkpoint."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(frame.f_globals.get("__name__") == _RESTORES and "restore" in frame.f_code.co_name for frame in frames)


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
