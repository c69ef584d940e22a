"""A callback of transformers' Trainer that moves the coefficients of converted blocks."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from revnet.conversion import ConversionSchedule, set_method
from revnet.conversion._schedule import check_schedule


class ConversionCallback(TrainerCallback):
    """Set the method of the converted blocks of a model before each update, by a schedule.

    The update is `state.global_step`, so that a resumed run continues the schedule. Evaluation during training uses the
    method of the next update.

    Args:
        schedule: The schedule.

    Raises:
        TypeError: `schedule` is not a `ConversionSchedule`.
        ValueError: At the beginning of training, the model has no converted blocks.
    """

    def __init__(self, schedule: ConversionSchedule) -> None:
        check_schedule(schedule)
        self.schedule = schedule

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the method of the first update, or of the update from which a run resumes."""
        self._set(kwargs["model"], state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Set the method of the next update, with which the weights are evaluated as well."""
        self._set(kwargs["model"], state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the method of the weights, which may be the best ones (`load_best_model_at_end`)."""
        best = getattr(state, "best_global_step", None) if args.load_best_model_at_end else None
        self._set(kwargs["model"], state.global_step if best is None else best)

    def _set(self, model: Any, num_updates: int) -> None:
        set_method(model, self.schedule.method_at(num_updates))
