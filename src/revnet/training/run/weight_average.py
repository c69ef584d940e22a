"""An exponential moving average of the weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from revnet.training.run.task import AbstractTask


class WeightAverage(Callback):
    """Average the weights of the network over the updates; validate and save the average.

    Parameters and floating-point buffers, such as the statistics of batch norms, are averaged; other buffers are
    copied. After `n` updates the decay is at most (1 + n) / (10 + n), so that a short run, too, forgets its first
    weights. The checkpoint holds the average, next to the weights that are trained.

    Args:
        decay: Decay of the average in each update.
    """

    # Lightning's own callback averages the whole LightningModule with its metrics, with rounding in constant buffers.

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._average: AveragedModel | None = None
        self._num_updates = 0
        self._restored: dict[str, Any] | None = None
        self._is_swapped = False
        self._model: nn.Module | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the average, or the trained weights if a validation has put the average into the network."""
        average = {} if self._average is None else self._average.state_dict()
        return {"average": average, "num_updates": self._num_updates, "is_swapped": self._is_swapped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the average until the network is on its device."""
        self._restored = state_dict

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the network, or restore its average."""
        assert isinstance(pl_module, AbstractTask)
        self._model = pl_module.saved_module.model
        self._average = AveragedModel(self._model, multi_avg_fn=self._update, use_buffers=True)
        self._average.requires_grad_(False)
        if self._restored is not None:
            self._average.load_state_dict(self._restored["average"])
            self._num_updates = self._restored["num_updates"]
            self._is_swapped = self._restored["is_swapped"]
            self._restored = None
        self._restore()
        pl_module.with_final_weights = self._swapped

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average once for each update, which may have several batches."""
        if trainer.global_step > self._num_updates:
            assert self._average is not None
            assert self._model is not None
            self._average.update_parameters(self._model)
            self._num_updates = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average into the network."""
        if self._average is not None and not self._is_swapped:
            if trainer.world_size > 1:
                # Each process has its own batch norm statistics, and the ones of the first process are saved.
                for buffer in self._average.module.buffers():
                    torch.distributed.broadcast(buffer, 0)
            self._swap()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the trained weights back into the network."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the trained weights back into the network."""
        self._restore()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the network."""
        assert isinstance(pl_module, AbstractTask)
        self._swap()
        pl_module.with_final_weights = AbstractTask.with_final_weights
        self._average = None

    def _update(self, averages: Any, values: Any, _num_averaged: Any) -> None:
        assert self._average is not None
        num_averaged = int(self._average.n_averaged)
        decay = min(self._decay, (1 + num_averaged) / (10 + num_averaged))
        if averages[0].is_floating_point():
            # Constants stay as they are to the last bit, unlike in a weighted sum.
            torch._foreach_lerp_(averages, values, 1 - decay)
        else:
            torch._foreach_copy_(averages, values)

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        if self._is_swapped:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._restore()

    def _restore(self) -> None:
        if self._is_swapped and self._average is not None:  # Training has not ended.
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        assert self._average is not None
        assert self._model is not None
        for average, tensor in zip(_tensors(self._average.module), _tensors(self._model), strict=True):
            value = tensor.clone()
            tensor.copy_(average)
            average.copy_(value)
        self._is_swapped = not self._is_swapped


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return chain(module.parameters(), module.buffers())
