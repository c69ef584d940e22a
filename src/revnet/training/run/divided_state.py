"""The state of a model whose parameters may be divided among processes."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the state of `module`; parameters that are divided among processes are whole in the main process only."""
    if not is_divided(module):
        return module.state_dict()
    state: dict[str, Any] = get_model_state_dict(
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    return state


def load_whole_state(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load whole tensors into `module`, whose parameters may be divided among processes."""
    _reshard(module)
    set_model_state_dict(module, dict(tensors), options=StateDictOptions(full_state_dict=True))


def _reshard(module: nn.Module) -> None:
    # After a forward pass without a backward pass, some parameters are still whole.
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def is_divided(module: nn.Module) -> bool:
    """Return whether parameters of `module` are divided among processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())
