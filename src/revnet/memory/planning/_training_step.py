"""The training step to plan."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from revnet.memory.planning._resized import resized
from revnet.memory.repeats._short_step import ShortSteps
from revnet.memory.step._optimizer import OptimizerFactory
from revnet.memory.step._predict import Prediction, predicting
from revnet.memory.step._run_step import Loss, device_of, tensors_in


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """A model with its inputs, optimizer, loss and precision: the arguments of `predict`."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    optimizer: OptimizerFactory | Optimizer | None
    loss: Loss | None
    autocast: torch.dtype | None
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    step_in_backward: bool = False
    chunked_loss: bool | None = None
    """Whether the loss of the model is chunked, which a plan sets; None leaves it as it is."""

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors among the inputs."""
        return tensors_in(self.args, self.kwargs)

    @property
    def num_samples(self) -> int:
        """Size of the batch: the first dimension of the first tensor."""
        return next((tensor.shape[0] for tensor in self.tensors if tensor.dim()), 1)

    @property
    def model_device(self) -> torch.device:
        """Device of the model."""
        return device_of(self.model, self.args, self.kwargs)

    def predicted(self, short: ShortSteps | None = None) -> AbstractContextManager[Prediction]:
        """Replace all tensors by fake ones within the context.

        Args:
            short: Predicts steps from models with fewer blocks; None to run all blocks.
        """
        return predicting(
            self.model,
            self.args,
            self.kwargs,
            optimizer=self.optimizer,
            loss=self.loss,
            autocast=self.autocast,
            dtype=self.dtype,
            device=self.device,
            step_in_backward=self.step_in_backward,
            short=short,
        )

    def with_batch_size(self, count: int) -> "TrainingStep":
        """Return the same step on `count` samples, as meta tensors."""

        def resize(tensor: Tensor) -> Tensor:
            return resized(tensor, (count, *tensor.shape[1:]))

        return replace(self._with_batch(resize), device=self.device or self.model_device)

    def first_samples(self, count: int) -> "TrainingStep":
        """Return the same step on the first `count` samples, or on all if there are fewer."""
        return self if count >= self.num_samples else self._with_batch(lambda tensor: tensor[:count])

    def _with_batch(self, change: Any) -> "TrainingStep":
        """Return the same step with every tensor of the batch replaced by the result of `change`."""
        total = self.num_samples

        def change_batch(tensor: Tensor) -> Tensor:
            return change(tensor) if tensor.dim() and tensor.shape[0] == total else tensor

        args, kwargs = tree_map_only(Tensor, change_batch, (self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)
