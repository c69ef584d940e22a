"""The bytes that a process keeps from one update to the next."""

from collections.abc import Iterable
from typing import NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


class StateBytes(NamedTuple):
    """Bytes of the tensors that a process keeps, which are parts of the whole if they are divided."""

    parameters: int
    """Bytes of the parameters."""
    gradients: int
    """Bytes of the gradients of an update."""
    optimizer: int
    """Bytes of the state of the optimizer."""


class StateCounter(Callback):
    """Count the bytes of parameters, gradients and optimizer state in this process."""

    def __init__(self) -> None:
        self._gradients = 0
        self._is_counted = False

    def state_dict(self) -> dict[str, int]:
        """Return the bytes of the gradients, for a finished run that is resumed."""
        return {"gradient_bytes": self._gradients}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Restore the bytes of the gradients."""
        self._gradients = state_dict["gradient_bytes"]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Count the gradients of the first update, since a validation frees them."""
        if not self._is_counted:
            self._gradients = _count([p.grad for p in pl_module.parameters() if p.grad is not None])
            self._is_counted = True

    def count(self, trainer: Trainer) -> StateBytes:
        """Return the bytes after training."""
        parameters = list(trainer.lightning_module.parameters())
        return StateBytes(_count(parameters), self._gradients, _count(_states(trainer.optimizers)))


def _states(optimizers: Iterable[Optimizer]) -> Iterable[Tensor]:
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _count(tensors: Iterable[Tensor]) -> int:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)
