"""A run whose half-blocks are advanced one call at a time, by blocks that their host calls one after the other.

`Rebuilder.run` runs a whole chain. An open run instead advances when the host calls the next block, and holds the final
streams after each call, so that the host may stop at any block. Each block has its own arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from revnet.engine._agreement import AgreementWatch
from revnet.engine._arguments import Arguments
from revnet.engine._chain import BoundChain, HalfBlock
from revnet.engine._digest import digest_of
from revnet.engine._rebuild import Rebuilder
from revnet.engine._streams import StreamSnapshot
from revnet.engine._tensors import storage_key, version_of

Given = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments of one block, without the stream."""


@dataclass(slots=True, eq=False)
class OpenChain(BoundChain):
    """One call of a chain in which the half-blocks of each role have their own arguments."""

    way_out: ClassVar[str | None] = (
        "Reverse exactly with `fraction_bits` in the method, or use coefficients closer to 1 (both by "
        "`revnet.conversion.set_method`), keep the inputs of blocks with `revnet.set_policy(model, 'checkpoint')`, or "
        "find the blocks that amplify it with `revnet.numerics.measure_drift`."
    )
    arguments: dict[str, Arguments] = field(default_factory=dict)
    """Arguments for replays by role."""
    running: Given | None = None
    """Arguments of the half-blocks that run for the first time."""

    def for_replays(self) -> "OpenChain":
        """Return the same call, whose arguments become known only as it advances."""
        return self

    def arguments_of(self, half_block: HalfBlock) -> Given:
        """Return the additional arguments of one residual function."""
        if not half_block.takes_arguments:
            return (), {}
        return self.arguments[half_block.role].again() if self.running is None else self.running


class OpenRun(Rebuilder):
    """A run that its caller advances, a few half-blocks at a time."""

    offset = 0
    """Number of half-blocks of the row before the chain of this run."""

    @property
    def position(self) -> int:
        """Number of half-blocks of the row before the current streams."""
        return self.offset + len(self.steps)

    @property
    def can_advance(self) -> bool:
        """Whether no backward pass has asked for a tensor yet, so that the streams have not been walked back."""
        return self._filled is None

    def advance(self, chain: OpenChain, count: int, role: str, given: Given, streams: list[Tensor]) -> None:
        """Run the next `count` half-blocks on `streams`, and hold the streams after them.

        Args:
            chain: The call that the run was made for.
            count: Number of half-blocks.
            role: The role of these half-blocks.
            given: Their arguments.
            streams: The streams, which are replaced in the list.
        """
        arguments = chain.arguments[role] = chain.replayed = Arguments(*given)
        chain.running = given
        surroundings, start = self.surroundings, len(self.steps)
        surroundings.given = arguments
        # The host has run between two blocks: it may have drawn numbers, or switched autocast.
        surroundings.refresh()
        known = set(map(storage_key, surroundings.arguments)) - {None}
        if new := [tensor for tensor in arguments.kept if storage_key(tensor) not in known]:
            surroundings.arguments += new
            surroundings.argument_versions += map(version_of, new)
            surroundings.add_devices({tensor.device for tensor in new} - surroundings.devices)
        self.is_finished = False
        try:
            for index in range(start, start + count):
                self._advance(chain, index, streams)
        finally:
            self.is_finished = True
            chain.running = chain.replayed = surroundings.given = None
            arguments.close()  # One may be the output of an earlier block, which leads back here (rule 1).
        if self.lowest >= 0:
            self._strides = [stream.stride() for stream in streams]
            self.hold(streams)

    def hold(self, streams: Sequence[Tensor], whole: Tensor | None = None) -> None:
        """Hold the final streams, and compute their checksums only after the last half-block of the chain."""
        if len(self.steps) == len(self.chain.half_blocks):
            super().hold(streams, whole)
            return
        held: list[Tensor | None] = [stream.detach() for stream in streams]  # A node would lead back here (rule 1).
        self.held = StreamSnapshot(len(self.steps), held, self._strides)

    def rebuild(self, index: int) -> None:
        """Fill the slots of half-block `index`, and walk the streams back to it."""
        if self._filled is None and self.held is not None:
            for observer in self.observers:
                # The host stopped before the end of the chain, where the digests are taken.
                if isinstance(observer, AgreementWatch) and len(observer.final) < len(self.held.held):
                    for number, stream in enumerate(self.held.held):
                        if stream is not None:
                            observer.final[number] = digest_of(stream)
        super().rebuild(index)
