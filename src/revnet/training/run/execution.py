"""How PyTorch executes a run: compiled, or with deterministic algorithms only."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from revnet.distributed._shard_units import units_of
from revnet.nn.blocks._abstract_block import compile_in_place
from revnet.training.processes.prepare_model import compilable_functions, uses_fsdp2
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
    functions = [] if config.compile == "off" else compilable_functions(model)
    graphs = _graphs_of(model, config) if config.compile == "model" else []
    for function in functions:
        compile_in_place(function)
    for module in graphs:
        module.compile()
    try:
        with warnings.catch_warnings():
            # PyTorch's compiler looks at the gradient of each input of a residual function.
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(is_deterministic, warn_only=is_warning)
        for module in (*functions, *graphs):
            module._compiled_call_impl = None
        restore_parameters(model, config)


def _graphs_of(model: nn.Module, config: AbstractRunConfig) -> list[nn.Module]:
    """Return the whole network or, if it is to be divided among processes, its blocks."""
    return [unit.module for unit in units_of(model)] if uses_fsdp2(config) else [model]
