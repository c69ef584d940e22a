"""Schedules that move the coefficients of a method during fine-tuning."""

from dataclasses import dataclass, fields, is_dataclass

from revnet._checks import check_count, describe, is_integer
from revnet.conversion._methods import AbstractMethod, Adapter


@dataclass(frozen=True)
class ConversionSchedule:
    """Move the coefficients of a method from one value to another, linearly in the number of updates.

    A schedule makes new methods and changes nothing itself. `set_method(model, schedule.method_at(update))` before an
    update sets one. The callbacks `revnet.lightning.ConversionCallback` and `revnet.transformers.ConversionCallback` do
    this.

    Args:
        start: The method before the first update, such as `Dr2Net(1, 0)`.
        end: The method from update `num_updates` on, such as `Dr2Net(0.5, 0.5)`. It has the class of `start`, and
            differs from it only in coefficients.
        num_updates: Number of updates from the start to the end.

    Raises:
        TypeError: `start` or `end` is not a method, or they have different classes.
        ValueError: `num_updates` is not a positive integer, or `start` and `end` differ in more than coefficients.

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
        reached = self.start.between(self.end, 1.0)
        if is_dataclass(self.end) and reached != self.end:
            names = [field.name for field in fields(self.end) if field.init]
            name = next(name for name in names if getattr(reached, name) != getattr(self.end, name))
            raise ValueError(
                f"`end` (={self.end}) must differ from `start` (={self.start}) only in coefficients, which a schedule "
                f"moves, and not in `{name}`; give both the same one."
            )
        _check_signs(self.start, self.end)

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


def _check_signs(start: AbstractMethod, end: AbstractMethod) -> None:
    """Raise if a schedule would lead to an `Adapter` of which a stream is lost."""
    if not isinstance(start, Adapter) or not isinstance(end, Adapter):
        return
    for name in ("a", "b"):
        if getattr(start, name) * getattr(end, name) < 0:
            raise ValueError(
                f"`{name}` of `start` (={start}) and of `end` (={end}) must have one sign, since the stream of an "
                "`Adapter` is lost at 0 between them."
            )


def check_schedule(schedule: object) -> None:
    """Raise unless `schedule` is a `ConversionSchedule`."""
    if not isinstance(schedule, ConversionSchedule):
        raise TypeError(f"`schedule` (={describe(schedule)}) must be a `ConversionSchedule`.")
