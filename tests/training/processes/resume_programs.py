"""Runs in several processes that are stopped and resumed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from revnet.training import resume
from revnet.training.run.checkpoint import whole_state
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
