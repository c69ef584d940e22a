"""A callback of transformers' Trainer that logs drift and peak memory."""

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from revnet._checks import check_count
from revnet._memory_readings import process_peak_bytes
from revnet.engine import DriftMeter
from revnet.numerics import Drift, drift_of


class DriftCallback(TrainerCallback):
    """Add the drift and the peak memory to what transformers' Trainer logs.

    Drift is the distance of rebuilt activations from the true ones. The callback measures updates themselves, at almost
    no cost, and does not change them. `Trainer` logs the largest error of the last measured update as `drift`, and the
    peak memory of the process, on a GPU the peak of PyTorch's allocator, as `peak_bytes`.

    Args:
        every: Number of updates from one measurement to the next; the first update is measured.

    Raises:
        ValueError: `every` is not a positive integer; at the start of training, the model has no reversible block.
    """

    def __init__(self, every: int = 100) -> None:
        check_count("every", every)
        self._every = every
        self._meter: DriftMeter | None = None
        self._measuring = ExitStack()
        self.measured: dict[int, Drift] = {}
        """Drift by the number of previous updates, as measured in this process."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise if the model has no reversible block."""
        if not drift_of(kwargs["model"], []).blocks:
            raise ValueError(
                f"`DriftCallback` found no reversible block in {type(kwargs['model']).__name__}, so there is nothing "
                "to measure; leave the callback out."
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start a measurement if one is due."""
        self._measuring.close()
        if state.global_step % self._every == 0:
            self._meter = DriftMeter()
            self._measuring.enter_context(self._meter.on())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the measurement."""
        self._measuring.close()
        meter, self._meter = self._meter, None
        if meter is not None and meter.records:
            self.measured[state.global_step] = drift_of(kwargs["model"], meter.records)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Add the figures to the log."""
        if not self.measured or not state.log_history:
            return
        model: nn.Module = kwargs["model"]
        device = next(model.parameters()).device
        figures: dict[str, float] = {"drift": self.measured[max(self.measured)].error}
        peak_bytes = process_peak_bytes(device if device.type == "cuda" else torch.device("cpu"))
        if peak_bytes is not None:
            figures["peak_bytes"] = peak_bytes
        state.log_history[-1].update(figures)
        if logs is not None:
            logs.update(figures)
