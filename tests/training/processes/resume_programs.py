"""Runs in several processes that are stopped and resumed."""

import json
import os
import resource
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from revnet.training import resume, train
from revnet.training.run.divided_state import whole_state
from tests.training.samples import train_with_copies


def train_and_resume_all(configs: Mapping[str, Any], folder: Path) -> dict[str, tuple[Any, list[Any]]]:
    """Return the result of each run, and of runs that continue from each of its checkpoints."""
    results = {}
    for name, config in configs.items():
        result, copies = train_with_copies(config, folder / name)
        results[name] = (result, [resume(copy, quiet=True) for copy in copies])
    return results


class WriteState(Callback):
    """Write the weights with which training starts."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer, pl_module):
        state = whole_state(pl_module.saved_module)
        if trainer.is_global_zero:
            torch.save(state, self.path)


class Disturb(Callback):
    """Disturb one of the processes after the second update.

    Args:
        how: `fill` lets every larger file fail, as a full disk does; `delete` deletes the folder of the run; `stop`
            sends SIGTERM.
        rank: The process.
        folder: Folder of the run.
    """

    def __init__(self, how: str, rank: int, folder: Path) -> None:
        self.how, self.rank, self.folder = how, rank, folder

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_rank != self.rank or trainer.global_step != 2:
            return
        if self.how == "fill":
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        elif self.how == "delete":
            shutil.rmtree(self.folder)
        else:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_exception(self, *_):
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def disturb_all(configs: Mapping[str, tuple[Any, Disturb]], folder: Path) -> None:
    """Train by each of the settings with a disturbance, and write the errors of this process."""
    errors = {}
    for name, (config, disturb) in configs.items():
        try:
            train(config, quiet=True, callbacks=[disturb])
        except (Exception, KeyboardInterrupt) as error:
            errors[name] = (type(error).__name__, str(error), getattr(error, "is_reported", None))
    (folder / f"errors_{os.environ['RANK']}.json").write_text(json.dumps(errors))
