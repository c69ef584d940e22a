"""What a slot in the autograd graph asks for its tensor."""

from contextlib import AbstractContextManager
from typing import Any, Protocol


class SlotFiller(Protocol):
    """What fills the slots of its calls when the backward pass asks for them.

    The autograd graph owns the filler (rule 1): each slot refers to it, and nothing else does.
    """

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held while slots are filled and emptied: several devices run several backward threads over one graph."""

    @property
    def is_finished(self) -> bool:
        """Whether the forward pass is over, so that calls can be replayed."""

    def rebuild(self, index: int) -> None:
        """Fill the slots of call number `index`."""
