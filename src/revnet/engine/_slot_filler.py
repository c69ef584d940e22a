"""The object that a slot in the autograd graph asks for its tensor."""

from contextlib import AbstractContextManager
from typing import Any, Protocol


class SlotFiller(Protocol):
    """Fills the slots of its calls when the backward pass asks for them.

    The autograd graph owns the filler (rule 1): each slot refers to it, and nothing else does.
    """

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Lock that is held while slots are filled and emptied, since each device has its own backward thread."""

    @property
    def is_finished(self) -> bool:
        """Whether the forward pass is over, so that calls can be replayed."""

    def rebuild(self, index: int) -> None:
        """Fill the slots of call number `index`."""
