"""The bytes that a process keeps from one update to the next."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from revnet.optim._used_gradient import UsedGradient


class StateBytes(NamedTuple):
    """Bytes of the tensors that a process keeps, which are parts of the whole if they are divided."""

    parameters: int
    """Bytes of the parameters."""
    gradients: int
    """Bytes of the gradients of an update; of the largest one if the optimizer steps in the backward pass."""
    optimizer: int
    """Bytes of the state of the optimizer."""


class StateCounter(Callback):
    """Count the bytes of parameters, gradients and optimizer state in this process."""

    def __init__(self) -> None:
        self._gradients = 0
        self._is_counted = False
        self.counted = StateBytes(0, 0, 0)
        """The bytes, after training."""

    def state_dict(self) -> dict[str, Any]:
        """Return the bytes of the gradients, for a resumed run that has no update left."""
        return {"gradients": self._gradients}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the bytes of the gradients; the next update counts them again."""
        self._gradients = state_dict["gradients"]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Count the gradients of the first update, since a validation frees them."""
        if not self._is_counted:
            trained = [p for p in pl_module.parameters() if p.grad is not None]  # as large as its gradient
            if any(isinstance(p.grad, UsedGradient) for p in trained):
                self._gradients = max(_count([p]) for p in trained)
            else:
                self._gradients = _count(trained)
            self._is_counted = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count parameters and optimizer state, before the parameters are cast for evaluation."""
        parameters, states = _count(pl_module.parameters()), _count(_states(trainer.optimizers))
        self.counted = StateBytes(parameters, self._gradients, states)


def _states(optimizers: Iterable[Optimizer]) -> Iterable[Tensor]:
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _count(tensors: Iterable[Tensor]) -> int:
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)
