"""A callback of transformers' Trainer that moves the coefficients of converted blocks."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from revnet.conversion import ConversionSchedule, set_method
from revnet.conversion._schedule import check_schedule


class ConversionCallback(TrainerCallback):
    """Set the method of the converted blocks of a model before each update, by a schedule.

    The update is `state.global_step`, so that a resumed run continues the schedule.

    Args:
        schedule: The schedule.

    Raises:
        TypeError: `schedule` is not a `ConversionSchedule`.
        ValueError: At the first update, the model has no converted blocks.
    """

    def __init__(self, schedule: ConversionSchedule) -> None:
        check_schedule(schedule)
        self.schedule = schedule

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the method of the update that begins."""
        set_method(kwargs["model"], self.schedule.method_at(state.global_step))
