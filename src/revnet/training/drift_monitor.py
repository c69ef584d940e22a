"""A Lightning callback that measures the drift of a training run at almost no cost."""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from revnet._atomic_file import write_table
from revnet.engine import DriftMeter
from revnet.numerics import Drift, drift_of, measure_drift
from revnet.training.settings.checks import check_integer

Loss = Callable[[Any, Any], Tensor]
Row = dict[str, Any]

_COLUMNS = ("update", "block", "error", "amplification", "gradient_error", "gradient_angle_degrees")
_FIGURES = ("drift", "drift_amplification", "keyframes", "gradient_drift", "gradient_angle_degrees")


class DriftMonitor(Callback):
    """Measure the drift, the distance of reconstructed activations from the true ones, every `every` updates.

    The callback works with any LightningModule that has reversible blocks, and measures the update itself: it keeps
    some hundred elements of the input of each residual function, and compares them after the reconstruction. It does
    not change the run: the weights are the same to the last bit without it. A resumed run continues with its figures.

    The callback logs the largest error of an update as `drift`, the average amplification of a block as
    `drift_amplification`, and the number of keyframes for a `tolerance` as `keyframes`. Loggers receive them after each
    measurement, and `trainer.callback_metrics` receives the largest values of an epoch at its end. The attribute
    `measured` and the CSV file have the figures of all blocks.

    Args:
        every: Number of updates from one measurement to the next; the first update is measured.
        path: CSV file for all blocks of all measurements, rewritten after each epoch.
        loss: Function from the LightningModule and a batch to the loss, which must log nothing. With it, the callback
            also compares gradients with the gradients of stored activations before each measured update. This takes the
            time of two to three updates and the memory of the stored twin. None compares activations only.

    Raises:
        TypeError: `every` is not an integer, or `loss` is not a function.
        ValueError: `every` is not positive; at the start of training, the module has no reversible block.
    """

    def __init__(self, every: int = 100, *, path: str | Path | None = None, loss: Loss | None = None) -> None:
        check_integer("every", every, at_least=1)
        if loss is not None and not callable(loss):
            raise TypeError(f"`loss` (={loss!r}) must be a function of the LightningModule and a batch, or None.")
        self._every = every
        self._path = None if path is None else Path(path)
        self._loss = loss
        self._meter: DriftMeter | None = None
        self._measuring = ExitStack()
        self._update = 0
        self._last_update: int | None = None
        """Number of updates before the measurement that is due, and before the last one."""
        self._rows: list[Row] = []
        self.measured: dict[int, Drift] = {}
        """Drift by the number of previous updates, as measured in this process."""

    def state_dict(self) -> dict[str, Any]:
        """Return the figures."""
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the figures."""
        self._rows = state_dict["rows"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raise if the module has no reversible block."""
        if not drift_of(pl_module, []).blocks:
            raise ValueError(
                f"`DriftMonitor` found no reversible block in {type(pl_module).__name__}, so there is nothing to "
                "measure; leave the callback out."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the figures of the last epoch, which Lightning would show again for an epoch without measurements."""
        for name in _FIGURES:
            trainer.callback_metrics.pop(name, None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start a measurement if one is due."""
        self._stop()
        update = trainer.global_step
        if update % self._every or update == self._last_update:  # an update may have several batches
            return
        self._update = update
        if self._loss is not None:
            self._record(update, self._compare_gradients(trainer, pl_module, batch), trainer, pl_module)
            return
        self._meter = DriftMeter()
        self._measuring.enter_context(self._meter.on())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the measurement."""
        meter = self._meter
        self._stop()
        if meter is not None and meter.records:
            self._record(self._update, drift_of(pl_module, meter.records), trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop measuring."""
        self._stop()

    def _stop(self) -> None:
        self._measuring.close()
        self._meter = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rewrite the file."""
        self._stop()  # The module's `on_train_batch_start` may have skipped the rest of the epoch.
        if self._path is None or not trainer.is_global_zero:
            return
        write_table(self._path, _COLUMNS, self._rows)

    def _compare_gradients(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Drift:
        assert self._loss is not None
        step = _Step(pl_module, self._loss, trainer.precision_plugin.train_step_context)
        return measure_drift(step, batch, loss=_identity, gradients=True)

    def _record(self, update: int, drift: Drift, trainer: Trainer, pl_module: LightningModule) -> None:
        self.measured[update], self._last_update = drift, update
        for block in drift.blocks:
            gradient = block.gradient
            self._rows.append(
                {
                    "update": update,
                    "block": block.name.removeprefix("module."),
                    "error": block.error,
                    "amplification": block.amplification,
                    "gradient_error": None if gradient is None else gradient.relative_error,
                    "gradient_angle_degrees": None if gradient is None else gradient.angle_degrees,
                }
            )
        values = [drift.error, drift.amplification, float(len(drift.keyframes))]
        if drift.gradient is not None:
            values += [drift.gradient.relative_error, drift.gradient.angle_degrees]
        figures = {name: value for name, value in zip(_FIGURES, values, strict=False) if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=update)
        for name, value in figures.items():
            pl_module.log(name, value, on_step=False, on_epoch=True, reduce_fx="max", batch_size=1, logger=False)


class _Step(nn.Module):
    """An update up to its loss, as a module."""

    def __init__(self, module: LightningModule, loss: Loss, context: Callable[[], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.module = module
        self._loss = loss
        self._context = context

    def forward(self, batch: Any) -> Tensor:
        with self._context():
            return self._loss(self.module, batch)


def _identity(loss: Tensor) -> Tensor:
    return loss
