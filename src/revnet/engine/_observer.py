"""What may watch a run, and correct it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from revnet.engine._chain import HalfBlock
from revnet.engine._streams import StreamSnapshot

if TYPE_CHECKING:
    from revnet.engine._rebuild import Rebuilder


class Observer:
    """Is asked at each turn of a run. By itself it does nothing; an observer overrides the turns that it needs."""

    looks_before_replays = False
    """Whether it overrides `before_replay`."""

    def on_forward(
        self, run: "Rebuilder", index: int, half_block: HalfBlock, streams: Sequence[Tensor], y: Tensor
    ) -> None:
        """Half-block `index` has read `streams`, and gave `y`."""

    def on_hold(self, streams: Sequence[Tensor | None], whole: Tensor | None) -> None:
        """The forward pass is over, and these final streams are held, which are parts of `whole` if there is one."""

    def before_rebuild(self, run: "Rebuilder") -> None:
        """The backward pass asks for the first time."""

    def before_replay(self, run: "Rebuilder", index: int, streams: StreamSnapshot, distance: int) -> None:
        """Function `index` is about to run again on `streams`, which were true `distance` half-blocks above."""

    def after_undo(self, run: "Rebuilder", index: int, half_block: HalfBlock, streams: StreamSnapshot) -> None:
        """Half-block `index` was undone; `streams` are the ones before it."""

    def after_fill(self, run: "Rebuilder", index: int, streams: StreamSnapshot) -> None:
        """The slots of half-block `index` were filled by a replay whose last saved tensor was another one."""

    def after_backward(self, run: "Rebuilder") -> None:
        """The backward pass of a retained graph is over."""
