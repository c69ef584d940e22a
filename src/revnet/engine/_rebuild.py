"""The run of a chain: it records the forward pass, and walks the streams back in the backward pass."""

import abc
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from revnet._torch_internals import call_after_backward
from revnet._types import Streams
from revnet.coupling import Additive
from revnet.engine._careful import check_finished
from revnet.engine._chain import BoundChain, HalfBlock, run_half_blocks, wrote_to_input
from revnet.engine._drift import active_meter
from revnet.engine._observer import Observer
from revnet.engine._record import RecordedCall, Surroundings
from revnet.engine._replay import replay
from revnet.engine._streams import StreamSnapshot
from revnet.engine._tensors import is_only_owner


class AbstractStep(abc.ABC):
    """A half-block that has run, and how to undo it.

    Args:
        half_block: The half-block.
        call: The recorded call of its function, or of its function and its coupling.
    """

    __slots__ = ("call", "half_block", "source_requires_grad", "stream_requires_grad")

    def __init__(self, half_block: HalfBlock, call: RecordedCall, streams: Sequence[Tensor]):
        self.half_block = half_block
        self.call = call
        self.source_requires_grad = streams[half_block.source].requires_grad
        self.stream_requires_grad = streams[half_block.target].requires_grad

    @abc.abstractmethod
    def first(self, run: "Rebuilder", chain: BoundChain, index: int, streams: Sequence[Tensor]) -> Tensor:
        """Return the updated stream, leaving slots in the graph."""

    @abc.abstractmethod
    def undo(self, run: "Rebuilder", streams: StreamSnapshot, *, fill: bool) -> None:
        """Undo the half-block before `streams.position`; `fill` its slots on the way."""

    @abc.abstractmethod
    def refill(self, run: "Rebuilder", streams: StreamSnapshot, index: int) -> None:
        """Fill the slots from the streams before the half-block, which stay as they are."""

    @abc.abstractmethod
    def rerun(self, run: "Rebuilder", streams: StreamSnapshot, index: int) -> None:
        """Run the function again for nothing but its digest, and leave the streams as they are."""

    @abc.abstractmethod
    def redo(self, run: "Rebuilder", streams: StreamSnapshot) -> Tensor:
        """Return the updated stream again, from the streams before the half-block."""

    def source_of(self, run: "Rebuilder", streams: StreamSnapshot, index: int) -> tuple[Tensor, Tensor | None]:
        """Return what the function reads, as the leaf of its second run; and again if it carries rounding."""
        distance = streams.origin - 1 - index
        if distance > 0 and not run.is_checking:
            for observer in run.observers:
                observer.before_replay(run, index, streams, distance)
        # `data` has a version of its own: the stream's goes up when it is written over later on.
        source = streams.read(self.half_block.source).data.requires_grad_(self.source_requires_grad)
        # An observer may have put the true streams in place.
        is_rounded = streams.origin > index + 1 and not self.half_block.coupling.is_exact
        return source, source if is_rounded else None


class AdditiveStep(AbstractStep):
    """A half-block whose slots hold the function alone, since the coupling saves nothing."""

    __slots__ = ()

    def first(self, run: "Rebuilder", chain: BoundChain, index: int, streams: Sequence[Tensor]) -> Tensor:
        """Return the updated stream, leaving slots of the function in the graph."""
        half_block = self.half_block
        source, stream = streams[half_block.source], streams[half_block.target]
        is_lowest = run.first_with_slots is None
        function: Callable[..., Any] = chain.call
        args: tuple[Any, ...] = (half_block, source)
        kwargs: dict[str, Any] = {}
        is_plain = chain.input_dtype is None and not chain.own_kwargs and half_block.takes_arguments
        if is_plain:  # `chain.call` without its questions.
            function, args, kwargs = half_block.function, (source, *chain.args), chain.kwargs
        version = source._version
        residual = self.call.record(
            run,
            index,
            function,
            args,
            kwargs,
            (source,),
            may_stop_early=is_lowest,
            keeps_tail=is_lowest and run.is_watched,
        )
        if is_plain and source._version != version:
            raise wrote_to_input(half_block)
        # What the coupling would do, without its checks, which cost more than the sum of small tensors.
        if (
            type(half_block.coupling) is Additive
            and type(residual) is Tensor
            and residual.dtype == stream.dtype
            and residual.shape == stream.shape
        ):
            return stream + residual
        return half_block.coupling.forward(stream, residual, half_block.name)

    def undo(self, run: "Rebuilder", streams: StreamSnapshot, *, fill: bool) -> None:
        """Run the function again, and take what it returns off the stream."""
        index, half_block = streams.position - 1, self.half_block
        is_needed = index > run.lowest
        residual = self._run_again(run, streams, index, fill=fill, needs_result=is_needed)
        if not is_needed:
            return
        y = streams.take(half_block.target)
        try:
            in_place = is_only_owner(y)
            if type(half_block.coupling) is Additive and residual.dtype == y.dtype and type(y) is Tensor:
                x = y.sub_(residual) if in_place else y - residual
            else:
                x = half_block.coupling.inverse(y, residual, half_block.name, in_place=in_place)
        except BaseException:
            streams.put(half_block.target, y)
            raise
        streams.put(half_block.target, x)
        streams.position = index

    def refill(self, run: "Rebuilder", streams: StreamSnapshot, index: int) -> None:
        """Run the function again on the stream that it read, which undoing it has left as it was."""
        self._run_again(run, streams, index, fill=True, needs_result=False)

    def rerun(self, run: "Rebuilder", streams: StreamSnapshot, index: int) -> None:
        """Run the function again on the stream that it read."""
        self._run_again(run, streams, index, fill=False, needs_result=False)

    def redo(self, run: "Rebuilder", streams: StreamSnapshot) -> Tensor:
        """Return the stream with what the function returns."""
        residual = self._run_again(run, streams, streams.position, fill=False, needs_result=True)
        return self.half_block.coupling.forward(streams.read(self.half_block.target), residual, self.half_block.name)

    def _run_again(
        self, run: "Rebuilder", streams: StreamSnapshot, index: int, *, fill: bool, needs_result: bool
    ) -> Any:
        source, rounded = self.source_of(run, streams, index)
        chain, half_block = run.chain, self.half_block
        function: Callable[..., Any] = chain.call
        args: tuple[Any, ...] = (half_block, source)
        kwargs: dict[str, Any] = {}
        is_plain = chain.input_dtype is None and not chain.own_kwargs and half_block.takes_arguments
        if is_plain:
            function, args, kwargs = half_block.function, (source, *chain.args), chain.kwargs
        residual = replay(self.call, function, args, kwargs, fill=fill, rounded=rounded, needs_result=needs_result)
        if is_plain and source._version:
            raise wrote_to_input(half_block)
        return residual if residual is None else residual.detach()


class JoinedStep(AbstractStep):
    """A half-block whose slots hold the function and the coupling, which needs the stream for its gradient."""

    __slots__ = ()

    def first(self, run: "Rebuilder", chain: BoundChain, index: int, streams: Sequence[Tensor]) -> Tensor:
        """Return the updated stream, leaving slots of function and coupling in the graph."""
        half_block = self.half_block
        source, stream = streams[half_block.source], streams[half_block.target]

        def compute() -> Tensor:
            return chain.join(half_block, stream, chain.call(half_block, source), chain.log_dets)

        y: Tensor = self.call.record(
            run,
            index,
            compute,
            (),
            {},
            (source, stream),
            may_stop_early=run.first_with_slots is None,
            keeps_tail=run.first_with_slots is None and run.is_watched,
        )
        return y

    def undo(self, run: "Rebuilder", streams: StreamSnapshot, *, fill: bool) -> None:
        """Run the function again, take what it returns off the stream, and join them again with gradients."""
        index = streams.position - 1
        x = self._run_again(run, streams, index, fill=fill)
        if index > run.lowest:
            streams.put(self.half_block.target, x)
            streams.position = index

    def refill(self, run: "Rebuilder", streams: StreamSnapshot, index: int) -> None:
        """Run the function again, and join what it returns to the stream before it."""
        self._run_again(run, streams, index, fill=True)

    def rerun(self, run: "Rebuilder", streams: StreamSnapshot, index: int) -> None:
        """Run function and coupling again."""
        self._run_again(run, streams, index, fill=False)

    def redo(self, run: "Rebuilder", streams: StreamSnapshot) -> Tensor:
        """Return the joined stream."""
        half_block, index = self.half_block, streams.position
        source, _ = self.source_of(run, streams, index)
        x = streams.read(half_block.target).data.requires_grad_(self.stream_requires_grad)

        def compute() -> Tensor:
            return run.chain.join(half_block, x, run.chain.call(half_block, source), run.new_log_dets())

        y: Tensor = replay(self.call, compute, (), {}, fill=False, rounded=None)
        return y.detach()

    def _run_again(self, run: "Rebuilder", streams: StreamSnapshot, index: int, *, fill: bool) -> Tensor:
        half_block, coupling = self.half_block, self.half_block.coupling
        source, rounded = self.source_of(run, streams, index)
        y_or_x = streams.read(half_block.target)
        x = y_or_x if streams.position == index else None

        def compute() -> Tensor:
            nonlocal x
            residual = run.chain.call(half_block, source)
            if x is None:
                with torch.no_grad():
                    x = coupling.inverse(y_or_x, residual, half_block.name)
            leaf = x.detach().requires_grad_(self.stream_requires_grad)
            return run.chain.join(half_block, leaf, residual, run.new_log_dets())

        # The stream before it is known only once the function has run to its end.
        needs_result = x is None or not fill
        replay(self.call, compute, (), {}, fill=fill, rounded=rounded, needs_result=needs_result)
        assert x is not None
        return x


class Rebuilder:
    """One forward pass through a chain, able to rebuild what it did not keep.

    The autograd graph owns it (rule 1). It records the half-blocks as steps, holds the final streams, and walks them
    back when the backward pass asks for a slot. What it is asked for may come in any order, several times, and from
    several threads.

    Args:
        chain: The call of the chain.
        streams: The streams that it begins with.
        observers: What watches the run.
    """

    def __init__(self, chain: BoundChain, streams: Sequence[Tensor], observers: Sequence[Observer]):
        self.chain = chain.for_replays()
        self.observers = observers
        self.is_watched = (meter := active_meter()) is None or not meter.is_quiet
        """Whether what is wrong raises; a quiet `DriftMeter` only records it."""
        self.surroundings = Surroundings(chain.tensors(), streams)
        self.steps: list[AbstractStep] = []
        self.first_with_slots: int | None = None
        """The lowest half-block of which autograd saved anything; below it, nothing is ever rebuilt."""
        self.keyframes: list[StreamSnapshot] = []
        """Streams that are held below the final ones, from the lowest up."""
        self.held: StreamSnapshot | None = None
        """The final streams, from which all others are rebuilt; None until the forward pass is over."""
        self.is_finished = False
        """Whether the forward pass is over."""
        self.lowest = -1
        """The half-block at which walking back ends: `first_with_slots`, or -1."""
        self.is_checking = False
        """Whether an observer runs functions again to look at what they give."""
        self.lock = threading.RLock()
        self._has_log_dets = chain.log_dets is not None
        self._last_alive = -1
        self._walk: StreamSnapshot | None = None
        self._filled: int | None = None
        self._has_begun = False

    def new_log_dets(self) -> list[Tensor] | None:
        """Return where a replay leaves its log-determinants, which are not read; None where they are not computed."""
        return [] if self._has_log_dets else None

    # Forward --------------------------------------------------------------------------------------------------------

    def run(self, chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
        """Run the chain, keeping none of its activations but the final streams."""
        running = list(streams)
        del streams  # From here on a stream may be freed as soon as it is used.

        final = run_half_blocks(chain, running, partial(self._advance, chain))
        if self.first_with_slots is not None:
            self.hold(final)
            chain.run = weakref.ref(self)
        return final

    def _advance(self, chain: BoundChain, index: int, streams: list[Tensor]) -> None:
        half_block = chain.chain.half_blocks[index]
        plans = chain.chain.plans
        if chain.chain.blocks is not None or not half_block.coupling.is_additive:
            self.surroundings.refresh()  # Hooks and couplings may draw random numbers, and hooks change autocast.
        call = RecordedCall(half_block.name, plans[index], half_block.function, self.surroundings)
        plans[index] = call.plan
        step = (AdditiveStep if half_block.coupling.is_additive else JoinedStep)(half_block, call, streams)
        self.steps.append(step)
        y = step.first(self, chain, index, streams)
        if call.metas:
            self._last_alive = index
            if self.first_with_slots is None:
                self.first_with_slots = self.lowest = index
        for observer in self.observers:
            observer.on_forward(self, index, half_block, streams, y)
        streams[half_block.target] = y

    def hold(self, streams: Sequence[Tensor]) -> None:
        """Hold the final streams, or the same values seen through other tensors (the parts of the caller's output)."""
        strides = self.held.strides if self.held is not None else [stream.stride() for stream in streams]
        held: list[Tensor | None] = [stream.detach() for stream in streams]
        last = self.steps[-1].half_block
        if self.first_with_slots == len(self.steps) - 1 and last.coupling.is_additive:
            # Only the last function runs again, and nothing below it: only the stream that it reads is needed.
            held = [stream if which == last.source else None for which, stream in enumerate(held)]
        self.held = StreamSnapshot(len(self.steps), held, strides)
        self.is_finished = True
        for observer in self.observers:
            observer.on_hold(held)

    # Backward -------------------------------------------------------------------------------------------------------

    def rebuild(self, index: int) -> None:
        """Fill the slots of half-block `index`, walking the streams back to it."""
        if not self.is_finished:
            check_finished(False)
        if not self._has_begun:
            self._has_begun = True
            assert self.held is not None
            self.held.check_memory()
            for observer in self.observers:
                observer.before_rebuild(self)
        # One function's activations at a time, even where the last one's were not read (rule 3).
        if self._filled is not None:
            self.steps[self._filled].call.empty()
        self._filled = index
        streams = self._streams_for(index)
        while streams.position > index + 1:
            self._undo(streams, fill=False)
        if streams.position == index + 1:
            self._undo(streams, fill=True)
        else:
            self.steps[index].refill(self, streams, index)
        if self.steps[index].call.tail_error:
            for observer in self.observers:
                observer.after_fill(self, index, streams)

    def _undo(self, streams: StreamSnapshot, *, fill: bool) -> None:
        index = streams.position - 1
        step = self.steps[index]
        step.undo(self, streams, fill=fill)
        if streams.position == index:
            for observer in self.observers:
                observer.after_undo(self, index, step.half_block, streams)

    def _streams_for(self, index: int) -> StreamSnapshot:
        """Return the streams to walk back to half-block `index`: at it or above it."""
        nearest = [keyframe for keyframe in self.keyframes if keyframe.position >= index]
        held = nearest[0] if nearest else self.held
        assert held is not None
        assert held.position >= index
        while self._last_alive > index and not self.steps[self._last_alive].call.is_alive():
            self._last_alive -= 1
        if self._last_alive <= index:
            # Nothing above `index` can be asked for again: what is held itself may move.
            self._walk = None
            self.held = held
            if self.keyframes:
                self.keyframes = [keyframe for keyframe in self.keyframes if keyframe.position < index]
            return held
        # The graph is retained: a walk on a fork leaves what is held as it is (rule 6).
        if self._walk is None or self._walk.position < index or held.position < self._walk.position:
            self._walk = held.fork()
            self._drop_walk_after_backward()
        return self._walk

    def _drop_walk_after_backward(self) -> None:
        run = weakref.ref(self)

        def drop() -> None:
            alive = run()
            if alive is not None:
                with alive.lock:  # Another thread may walk at this moment.
                    alive._walk = None
                    for observer in alive.observers:
                        observer.after_backward(alive)

        call_after_backward(drop)
