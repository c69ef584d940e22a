"""The interface of objects that watch a run and may correct it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from revnet.engine._chain import HalfBlock
from revnet.engine._streams import StreamSnapshot

if TYPE_CHECKING:
    from revnet.engine._rebuild import Rebuilder


class Observer:
    """Interface of an object that a run calls at each stage.

    The methods do nothing here; an observer overrides the ones that it needs.
    """

    looks_before_replays = False
    """Whether the observer overrides `before_replay`."""

    def on_forward(
        self, run: "Rebuilder", index: int, half_block: HalfBlock, streams: Sequence[Tensor], y: Tensor
    ) -> None:
        """Handle the result `y` of half-block `index`, which has read `streams`."""

    def on_hold(self, streams: Sequence[Tensor | None], whole: Tensor | None) -> None:
        """Handle the final streams when the forward pass is over. They are parts of `whole`, if it is given."""

    def before_rebuild(self, run: "Rebuilder") -> None:
        """Handle the first request of the backward pass."""

    def before_replay(self, run: "Rebuilder", index: int, streams: StreamSnapshot, distance: int) -> None:
        """Handle function `index` before it runs again on `streams`, which were exact `distance` half-blocks above."""

    def after_undo(self, run: "Rebuilder", index: int, half_block: HalfBlock, streams: StreamSnapshot) -> None:
        """Handle half-block `index` after it was undone; `streams` are the streams before it."""

    def after_fill(self, run: "Rebuilder", index: int, streams: StreamSnapshot) -> None:
        """Handle half-block `index` after a replay that filled its slots and whose last saved tensor differed."""

    def after_backward(self, run: "Rebuilder") -> None:
        """Handle the end of a backward pass over a retained graph."""
