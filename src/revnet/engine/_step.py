"""Half-blocks that have run, and how to undo them."""

import abc
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from revnet.engine._chain import BoundChain, HalfBlock
from revnet.engine._moves import put_back
from revnet.engine._record import RecordedCall
from revnet.engine._replay import replay
from revnet.engine._streams import StreamSnapshot

if TYPE_CHECKING:
    from revnet.engine._moves import HeldStream
    from revnet.engine._rebuild import Rebuilder


class AbstractStep(RecordedCall, abc.ABC):
    """A half-block that has run: the recorded call of its function, or of function and coupling, and how to undo it."""

    __slots__ = ("half_block", "held_before", "source_requires_grad", "stream_requires_grad")

    half_block: HalfBlock
    held_before: "HeldStream | None"
    """The stream that it updates, before the update, if the run holds it."""
    source_requires_grad: bool
    stream_requires_grad: bool

    @abc.abstractmethod
    def first(
        self, run: "Rebuilder", chain: BoundChain, index: int, half_block: HalfBlock, streams: Sequence[Tensor]
    ) -> Tensor:
        """Return the updated stream, and leave slots in the graph."""

    @abc.abstractmethod
    def undo(self, run: "Rebuilder", streams: StreamSnapshot, *, fill: bool) -> None:
        """Undo the half-block before `streams.position`, and fill its slots if `fill` is true."""

    @abc.abstractmethod
    def refill(self, run: "Rebuilder", streams: StreamSnapshot, index: int) -> None:
        """Fill the slots from the streams before the half-block, which do not change."""

    @abc.abstractmethod
    def rerun(self, run: "Rebuilder", streams: StreamSnapshot, index: int) -> None:
        """Run the function again only for its digest; the streams do not change."""

    @abc.abstractmethod
    def redo(self, run: "Rebuilder", streams: StreamSnapshot) -> Tensor:
        """Compute the updated stream again from the streams before the half-block."""


class AbstractFunctionStep(AbstractStep):
    """A half-block whose slots belong only to the function."""

    __slots__ = ("kept_of_stream",)

    kept_of_stream: Tensor | None
    """What the inverse of the coupling needs of the stream before the update, if the coupling remembers it."""

    def part(self, y: Tensor, residual: Tensor, *, in_place: bool) -> Tensor:
        """Return the stream that the coupling combined with a residual."""
        coupling, name = self.half_block.coupling, self.half_block.name
        if coupling.remembers:
            return coupling.inverse_kept(y, residual, self.kept_of_stream, name, in_place=in_place)
        return coupling.inverse(y, residual, name, in_place=in_place)

    @abc.abstractmethod
    def run_again(
        self, run: "Rebuilder", streams: StreamSnapshot, index: int, *, fill: bool, needs_result: bool
    ) -> Any:
        """Run the function again on its source stream, and return the result if it is needed."""

    def refill(self, run: "Rebuilder", streams: StreamSnapshot, index: int) -> None:
        """Run the function again on its source stream, which the undo did not change."""
        # Nothing is undone, so the run may stop early (rule 7).
        self.run_again(run, streams, index, fill=True, needs_result=False)

    def rerun(self, run: "Rebuilder", streams: StreamSnapshot, index: int) -> None:
        """Run the function again on its source stream."""
        self.run_again(run, streams, index, fill=False, needs_result=False)

    def redo(self, run: "Rebuilder", streams: StreamSnapshot) -> Tensor:
        """Return the stream combined with the result of the function."""
        residual = self.run_again(run, streams, streams.position, fill=False, needs_result=True)
        return self.half_block.coupling.forward(streams.read(self.half_block.target), residual, self.half_block.name)


class JoinedStep(AbstractStep):
    """A half-block whose slots belong to the function and the coupling, which needs the stream for its gradient."""

    __slots__ = ()

    def first(
        self, run: "Rebuilder", chain: BoundChain, index: int, half_block: HalfBlock, streams: Sequence[Tensor]
    ) -> Tensor:
        """Return the updated stream, and leave slots of the function and the coupling in the graph."""
        self.half_block = half_block
        source, stream = streams[half_block.source], streams[half_block.target]
        # The leaves of a replay must require gradients as these do, or autograd saves different tensors (rule 4).
        self.source_requires_grad, self.stream_requires_grad = source.requires_grad, stream.requires_grad

        def compute() -> Tensor:
            return chain.join(half_block, stream, chain.call(half_block, source), chain.log_dets)

        y: Tensor = self.record(
            run,
            index,
            compute,
            (),
            (source, stream, *run.chain.inputs),
            may_stop_early=run.lowest < 0 or self.held_before is not None,
            keeps_tail=run.is_watched,
        )
        return y

    def undo(self, run: "Rebuilder", streams: StreamSnapshot, *, fill: bool) -> None:
        """Run the function again, invert the coupling, and run the coupling forward with gradients."""
        index = streams.position - 1
        if self.held_before is not None:
            put_back(run, self, streams, fill=fill)
            return
        x = self._run_again(run, streams, index, fill=fill)
        if index > run.lowest or run.undoes_all:
            streams.put(self.half_block.target, x)
            streams.position = index

    def refill(self, run: "Rebuilder", streams: StreamSnapshot, index: int) -> None:
        """Run the function again, and combine its result with the stream before the half-block."""
        self._run_again(run, streams, index, fill=True)

    def rerun(self, run: "Rebuilder", streams: StreamSnapshot, index: int) -> None:
        """Run the function and the coupling again."""
        self._run_again(run, streams, index, fill=False)

    def redo(self, run: "Rebuilder", streams: StreamSnapshot) -> Tensor:
        """Return the stream combined with the result of the function."""
        half_block, index = self.half_block, streams.position
        source, _ = run.source_of(self, streams, index)
        x = streams.read(half_block.target).data.requires_grad_(self.stream_requires_grad)

        def compute() -> Tensor:
            return run.chain.join(half_block, x, run.chain.call(half_block, source), _new_log_dets(run))

        y: Tensor = replay(self, compute, (), fill=False, is_rounded=False)
        # Its graph would keep all tensors that this replay saved.
        return y.detach()

    def _run_again(self, run: "Rebuilder", streams: StreamSnapshot, index: int, *, fill: bool) -> Tensor:
        half_block, coupling = self.half_block, self.half_block.coupling
        source, is_rounded = run.source_of(self, streams, index)
        y_or_x = streams.read(half_block.target)
        # If it is already undone, this is the stream before the half-block.
        x = y_or_x if streams.position == index else None if self.held_before is None else self.held_before.read()

        def compute() -> Tensor:
            nonlocal x
            residual = run.chain.call(half_block, source)
            if x is None:
                # The first run did not call `inverse`, so the tensors that autograd would save for it have no slots.
                with torch.no_grad():
                    x = coupling.inverse(y_or_x, residual, half_block.name)
            # `data` has a version counter of its own: the inverse may have finished its result in place.
            leaf = x.data.requires_grad_(self.stream_requires_grad)
            return run.chain.join(half_block, leaf, residual, _new_log_dets(run))

        # The stream before the half-block is known only once the function has run to its end.
        needs_result = x is None or not fill
        replay(self, compute, (), fill=fill, is_rounded=is_rounded, needs_result=needs_result)
        assert x is not None
        return x


def _new_log_dets(run: "Rebuilder") -> list[Tensor] | None:
    """Return a list for the log-determinants of a replay, which are not read; None if they are not computed."""
    return [] if run.has_log_dets else None
