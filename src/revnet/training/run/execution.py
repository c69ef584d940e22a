"""How PyTorch executes a run: compiled, or with deterministic algorithms only."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from revnet.distributed._shard_units import units_of
from revnet.training.processes.prepare_model import uses_fsdp2
from revnet.training.run.precision import restore_parameters
from revnet.training.settings.run_config import AbstractRunConfig


@contextmanager
def execution(config: AbstractRunConfig, model: nn.Module) -> Iterator[None]:
    """Execute `model` as the settings ask, and leave PyTorch and the model as they were."""
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    is_warning = torch.is_deterministic_algorithms_warn_only_enabled()
    if config.deterministic:
        # Without it, cuBLAS refuses to run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    compiled = _parts_to_compile(model, config) if config.compile else []
    for part in compiled:
        part.compile()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic, warn_only=is_warning)
        for part in compiled:
            part._compiled_call_impl = None
        restore_parameters(model, config)


def _parts_to_compile(model: nn.Module, config: AbstractRunConfig) -> list[nn.Module]:
    """Return the whole network or, if it is to be divided among processes, its blocks."""
    return [unit.module for unit in units_of(model)] if uses_fsdp2(config) else [model]
