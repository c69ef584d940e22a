"""The interface of objects that keep parts of a first run, so that its replay does not compute them again."""

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from revnet.engine._record import Saved

Function = Callable[..., Any]


class AbstractKeeper(abc.ABC):
    """Keeps parts of one call of a function, which it wraps for its first run and for each replay."""

    @abc.abstractmethod
    def recording(self, function: Function, saved: "Saved") -> Function:
        """Return `function` for its first run, in which autograd saves the tensors in `saved`."""

    @abc.abstractmethod
    def replaying(self, function: Function, name: str, caught: list[Tensor], lasting: set[int]) -> Function:
        """Return `function` for a replay.

        Args:
            function: The function.
            name: Its place in the model, for error messages.
            caught: List of the tensors that autograd has saved so far.
            lasting: Identities of the tensors that outlive the call, which have no slots.
        """

    def drop(self, result: Any) -> None:  # noqa: B027 - most keepers drop nothing
        """Drop what the replay will not need, because it stops before it computes `result`."""


def num_slots(tensors: list[Tensor], lasting: set[int]) -> int:
    """Return how many of the tensors that autograd saved do not outlive the call."""
    return sum([id(t) not in lasting and ((base := t._base) is None or id(base) not in lasting) for t in tensors])
