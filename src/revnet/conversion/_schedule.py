"""Schedules that move the coefficients of a method during fine-tuning."""

from dataclasses import dataclass

from revnet._checks import check_count, describe, is_integer
from revnet.conversion._methods import AbstractMethod


@dataclass(frozen=True)
class ConversionSchedule:
    """Move the coefficients of a method from one value to another, linearly in the number of updates.

    A schedule makes new methods and changes nothing itself. `set_method(model, schedule.method_at(update))` before an
    update sets one. The callbacks `revnet.lightning.ConversionCallback` and `revnet.transformers.ConversionCallback` do
    this.

    Args:
        start: The method before the first update, such as `Dr2Net(1, 0)`.
        end: The method from update `num_updates` on, such as `Dr2Net(0.5, 0.5)`. It has the class of `start`.
        num_updates: Number of updates from the start to the end.

    Raises:
        TypeError: `start` or `end` is not a method, or they have different classes.
        ValueError: `num_updates` is not a positive integer.

    Example:
        >>> from revnet.conversion import Consistent, ConversionSchedule
        >>> schedule = ConversionSchedule(Consistent(0), Consistent(0.25), num_updates=100)
        >>> [schedule.method_at(update).a for update in (0, 50, 100, 200)]
        [0.0, 0.125, 0.25, 0.25]
    """

    start: AbstractMethod
    end: AbstractMethod
    num_updates: int

    def __post_init__(self) -> None:
        for name, method in {"start": self.start, "end": self.end}.items():
            if not isinstance(method, AbstractMethod):
                raise TypeError(
                    f"`{name}` (={describe(method)}) must be a method of conversion, such as `Consistent(0.25)`."
                )
        if type(self.start) is not type(self.end):
            raise TypeError(f"`end` (={self.end}) must have the class of `start` (={self.start}).")
        check_count("num_updates", self.num_updates)

    def method_at(self, update: int) -> AbstractMethod:
        """Return the method for an update.

        Args:
            update: Number of updates before it.

        Raises:
            ValueError: `update` is negative, or not an integer.
        """
        if not is_integer(update) or update < 0:
            raise ValueError(f"`update` (={describe(update)}) must be a number of updates, from 0 up.")
        return self.start.between(self.end, min(1.0, update / self.num_updates))


def check_schedule(schedule: object) -> None:
    """Raise unless `schedule` is a `ConversionSchedule`."""
    if not isinstance(schedule, ConversionSchedule):
        raise TypeError(f"`schedule` (={describe(schedule)}) must be a `ConversionSchedule`.")
