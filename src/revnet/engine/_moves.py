"""Two ways to pay for less recomputation with memory: hold the stream that a function reads, or keep outputs inside it.

A stream that is held does not have to be rebuilt, so the result of the function that updates it next is not subtracted.
That function runs again only up to the last tensor that autograd saved, or not at all. An output that is kept
(`_keep`) is not computed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from revnet.engine._careful import modified_stream
from revnet.engine._keep import AbstractKeepRule, KeptOutputs
from revnet.engine._tensors import version_of

if TYPE_CHECKING:
    from revnet.engine._chain import BoundChain
    from revnet.engine._rebuild import Rebuilder
    from revnet.engine._step import AbstractStep
    from revnet.engine._streams import StreamSnapshot


@dataclass(frozen=True)
class Moves:
    """What a run keeps for one half-block, in addition to the final streams."""

    holds_source: bool = False
    """Whether it holds the stream that the function reads."""
    keep: AbstractKeepRule | None = None
    """Rule that says which outputs inside the function it keeps; None for none."""


class Holding:
    """What one run holds in addition to the final streams."""

    def __init__(self) -> None:
        self.waiting: dict[int, HeldStream] = {}
        """Streams that functions have read, by number, until they are updated."""
        self.num_kept_bytes = [0]
        """Number of bytes of the outputs that are kept."""


class HeldStream(NamedTuple):
    """A stream that a run holds because a function reads it."""

    tensor: Tensor
    version: int
    reader: str
    """Name of the function that reads it."""

    def read(self) -> Tensor:
        """Return the stream.

        Raises:
            ReconstructionError: It was modified in place.
        """
        if version_of(self.tensor) != self.version:
            raise modified_stream(self.reader, self.tensor, self.version)
        return self.tensor


def prepare(run: "Rebuilder", chain: "BoundChain", step: "AbstractStep", index: int, streams: Sequence[Tensor]) -> None:
    """Hold the stream that half-block `index` is about to read, and give its step the stream that it updates.

    Args:
        run: The run.
        chain: The chain; its `moves` say what to keep.
        step: The step of the half-block.
        index: Index of the half-block.
        streams: The streams before it.
    """
    assert chain.chain.moves is not None
    half_block, moves, holding = chain.half_blocks[index], chain.chain.moves[index], chain.holding
    if holding is None:
        holding = chain.holding = Holding()
    if moves is not None and moves.holds_source:
        for number in half_block.sources:
            # `detach` drops the node, which may lead back to the run (rule 1), and shares the version, which shows
            # writes.
            stream = streams[number]
            holding.waiting[number] = HeldStream(stream.detach(), version_of(stream), half_block.name)
    # The stream is undone only down to the lowest half-block.
    before = holding.waiting.pop(half_block.target, None)
    step.held_before = before if run.lowest >= 0 or run.undoes_all else None
    if moves is not None and moves.keep is not None:
        step.keepers = (KeptOutputs(moves.keep, holding.num_kept_bytes),)
    if index == len(chain.half_blocks) - 1:
        holding.waiting.clear()  # The final streams are held anyway.


def put_back(run: "Rebuilder", step: "AbstractStep", streams: "StreamSnapshot", *, fill: bool) -> None:
    """Undo the half-block before `streams.position` with the stream that is held, and fill its slots if `fill`."""
    assert step.held_before is not None
    if fill:
        step.refill(run, streams, streams.position - 1)
    target = step.half_block.target
    tensor = step.held_before.read()
    if tensor.stride() != streams.strides[target]:  # Kernels round differently on another layout.
        strides = list(streams.strides)
        strides[target] = tensor.stride()
        streams.strides = strides
    if streams is run.held:  # Nothing asks for it again, so the walk alone holds it, and may overwrite it.
        step.held_before = None
    else:
        tensor = tensor.detach()  # A second owner of the memory, so that the walk does not overwrite it.
    streams.put(target, tensor)
    streams.position -= 1
