"""The loggers of a run besides its CSV files: TensorBoard, Weights & Biases, MLflow."""

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from revnet._atomic_file import write_text
from revnet._documents import read_json
from revnet.errors import CheckpointError
from revnet.training.run import run_dir
from revnet.training.settings.checks import split_loggers
from revnet.training.settings.choices import LOGGERS
from revnet.training.settings.run_config import AbstractRunConfig

_PROJECT = "revnet"


def make_loggers(config: AbstractRunConfig, folder: Path) -> list[Logger]:
    """Return the loggers that `config` names, but for the CSV files, which every run writes.

    A resumed run goes on with the run that the loggers already know. TensorBoard writes to `folder`. Weights & Biases
    is offline unless it knows an API key: `wandb sync` uploads later. MLflow writes to `MLFLOW_TRACKING_URI`, or to an
    SQLite file next to `folder`.
    """
    known = _read_ids(folder)
    loggers: list[Logger] = []
    for name in split_loggers(config.logger):
        match name:
            case "tensorboard":
                loggers.append(TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False))
            case "wandb":
                loggers.append(_make_wandb(folder, known.get("wandb") or uuid.uuid4().hex[:8]))
            case "mlflow":
                loggers.append(_make_mlflow(folder, known.get("mlflow")))
    return loggers


class LoggedRun(Callback):
    """Send the settings to the loggers, and remember under which names the loggers know the run.

    Args:
        config: The settings.
        folder: Folder of the run.
    """

    def __init__(self, config: AbstractRunConfig, folder: Path) -> None:
        self._config = config
        self._folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Send the settings, and write the names."""
        if not (trainer.loggers and trainer.is_global_zero):
            return
        settings: dict[str, Any] = asdict(self._config)
        names: dict[str, str] = {}
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)
            if isinstance(logger, WandbLogger):
                names["wandb"] = str(logger.version)
            elif isinstance(logger, MLFlowLogger):
                names["mlflow"] = str(logger.run_id)
        if names:
            write_text(self._folder / run_dir.LOGGERS, json.dumps(names) + "\n")


@contextmanager
def logger_errors() -> Iterator[None]:
    """Report in one line an error that comes from a logger's own package: no connection, or no account.

    Raises:
        ValueError: A logger failed.
    """
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package not in LOGGERS:
            raise
        message = " ".join(str(error).split())
        raise ValueError(f"`logger` (={package!r}) failed: {message}; fix it, or leave {package} out.") from error


def describe_loggers(config: AbstractRunConfig, folder: Path) -> list[str]:
    """Return a line of text for each logger of `make_loggers`: its name, and where its figures are."""
    places: dict[str, Callable[[], str]] = {
        "tensorboard": lambda: str(folder / "tensorboard"),
        "wandb": lambda: f"{folder / 'wandb'}, offline" if _is_wandb_offline() else "online",
        "mlflow": lambda: _mlflow_uri(folder),
    }
    return [f"{name}: {places[name]()}" for name in split_loggers(config.logger) if name in places]


def _make_wandb(folder: Path, run_id: str) -> Logger:
    # Lightning's `offline` sets an environment variable that wandb may have read already.
    mode = "offline" if _is_wandb_offline() else None
    return WandbLogger(
        name=folder.name, save_dir=folder, id=run_id, project=_PROJECT, mode=mode, settings={"silent": True}
    )


def _is_wandb_offline() -> bool:
    """Return whether neither the environment nor the user's netrc file says how to reach a server."""
    if os.environ.keys() & {"WANDB_MODE", "WANDB_API_KEY"}:
        return False
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host or "") is None
    except (OSError, NetrcParseError):
        return True


def _make_mlflow(folder: Path, run_id: str | None) -> Logger:
    return MLFlowLogger(experiment_name=_PROJECT, run_name=folder.name, tracking_uri=_mlflow_uri(folder), run_id=run_id)


def _mlflow_uri(folder: Path) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve().parent / 'mlflow.db'}"


def _read_ids(folder: Path) -> dict[str, str]:
    path = folder / run_dir.LOGGERS
    if not path.is_file():
        return {}
    ids = read_json(path)
    if not all(isinstance(value, str) for value in ids.values()):
        raise CheckpointError(f"`{path}` is damaged: the names of runs must be text; restore the file.")
    return ids
