"""A training step of a LightningModule as a module, for the memory tools: it logs nothing."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

_CODE = "`training_step`"


class SilentStep(nn.Module):
    """The `training_step` of a LightningModule, from a batch to the loss.

    Args:
        module: The LightningModule.
        batch_idx: Index of the batch.
        context: Makes the context in which Lightning runs the step, such as autocast.

    Shape:
        batch: Any. Output: ().
    """

    def __init__(
        self, module: LightningModule, batch_idx: int, context: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        super().__init__()
        self.module = module
        self._batch_idx = batch_idx
        self._context = context

    def forward(self, batch: Any) -> Tensor:
        """Compute the loss."""
        module = self.module
        # The rule by which Lightning passes the index.
        with_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        with self._context(), _silenced(module):
            output = module.training_step(batch, self._batch_idx) if with_index else module.training_step(batch)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"{_CODE} of {type(module).__name__} returned {type(output).__name__} for the first batch; it must "
                "return the loss, a tensor, or a dict with the key 'loss'."
            )
        return loss


@contextmanager
def _silenced(module: LightningModule) -> Iterator[None]:
    """Let `module` log nothing and update no metrics, which would need the values of tensors."""
    with ExitStack() as stack:
        for name in ("log", "log_dict"):
            stack.enter_context(_replaced(module, name, _ignore))
        for metric in module.modules():
            if isinstance(metric, Metric | MetricCollection):
                result: Any = {} if isinstance(metric, MetricCollection) else torch.zeros(())
                for name in ("forward", "update", "compute"):
                    stack.enter_context(_replaced(metric, name, _Returns(result)))
        yield


@contextmanager
def _replaced(module: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one instance."""
    attributes = module.__dict__
    before = {name: attributes[name]} if name in attributes else {}
    attributes[name] = function
    try:
        yield
    finally:
        attributes.pop(name, None)
        attributes.update(before)


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None


class _Returns:
    """A function that returns the same value for any arguments."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._value
