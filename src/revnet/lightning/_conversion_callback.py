"""A Lightning callback that moves the coefficients of converted blocks."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from revnet.conversion import ConversionSchedule, set_method
from revnet.conversion._schedule import check_schedule


class ConversionCallback(Callback):
    """Set the method of the converted blocks of any LightningModule before each update, by a schedule.

    The update is `trainer.global_step`, so that a resumed run continues the schedule. With manual optimization,
    Lightning counts the steps of all optimizers. Validation uses the method of the next update. So do `trainer.test`
    and the other loops, for weights that this trainer has trained or has loaded from a checkpoint with this callback.

    Args:
        schedule: The schedule.

    Raises:
        TypeError: `schedule` is not a `ConversionSchedule`.
        ValueError: At the first batch, the module has no converted blocks.
    """

    def __init__(self, schedule: ConversionSchedule) -> None:
        check_schedule(schedule)
        self.schedule = schedule
        self._num_updates: int | None = None
        """Number of updates of the weights; None if it is not known."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the method of the update that this batch belongs to."""
        self._set(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Remember the updates for a checkpoint."""
        self._num_updates = trainer.global_step

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the method of the weights."""
        self._set(trainer, pl_module)

    on_train_end = on_test_start = on_predict_start = on_validation_start

    def state_dict(self) -> dict[str, Any]:
        """Return the number of updates, for a checkpoint."""
        return {"num_updates": self._num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the number of updates from a checkpoint."""
        self._num_updates = state_dict["num_updates"]

    def _set(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._num_updates = trainer.global_step
        if self._num_updates is not None:
            set_method(module, self.schedule.method_at(self._num_updates))
