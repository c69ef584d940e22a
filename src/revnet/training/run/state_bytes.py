"""The bytes that a process keeps from one update to the next."""

from collections.abc import Iterable
from typing import NamedTuple

from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class StateBytes(NamedTuple):
    """Bytes of the tensors that a process keeps, which are parts of the whole if they are divided."""

    parameters: int
    """Bytes of the parameters."""
    gradients: int
    """Bytes of the gradients, after the last update."""
    optimizer: int
    """Bytes of the state of the optimizer."""


def count_state_bytes(trainer: Trainer) -> StateBytes:
    """Count the bytes of the trained parameters, their gradients and the state of the optimizer in this process."""
    assert trainer.lightning_module is not None
    parameters = list(trainer.lightning_module.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return StateBytes(_count(parameters), _count(gradients), _count(_states(trainer.optimizers)))


def _states(optimizers: Iterable[Optimizer]) -> Iterable[Tensor]:
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _count(tensors: Iterable[Tensor]) -> int:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)
