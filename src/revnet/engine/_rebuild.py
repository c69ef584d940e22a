"""The run of a chain: it records the forward pass, and walks the streams back in the backward pass."""

import threading
import weakref
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from revnet._torch_internals import call_after_backward
from revnet._types import Streams
from revnet.engine._additive_step import AdditiveStep
from revnet.engine._block_hooks import run_through_blocks
from revnet.engine._careful import check_finished
from revnet.engine._chain import BoundChain
from revnet.engine._drift import active_meter
from revnet.engine._observer import Observer
from revnet.engine._record import Surroundings
from revnet.engine._step import AbstractStep, JoinedStep
from revnet.engine._snapshot import StreamSnapshot


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
        self.correctors = [observer for observer in observers if observer.looks_before_replays]
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

        if chain.chain.blocks is None:
            for index in range(len(chain.chain.half_blocks)):
                self._advance(chain, index, running)
        else:
            run_through_blocks(chain, running, partial(self._advance, chain))
        final = tuple(running)
        if self.first_with_slots is not None:
            self.hold(final)
            chain.run = weakref.ref(self)
        return final

    def _advance(self, chain: BoundChain, index: int, streams: list[Tensor]) -> None:
        half_block, plans, surroundings = chain.chain.half_blocks[index], chain.chain.plans, self.surroundings
        is_additive = half_block.coupling.is_additive
        if chain.chain.blocks is not None or not is_additive:
            surroundings.refresh()  # Hooks and couplings may draw random numbers, and hooks change autocast.
        kind: type[AbstractStep] = AdditiveStep if is_additive else JoinedStep
        step = kind(half_block.name, plans[index], half_block.function, surroundings)
        plans[index] = step.plan
        self.steps.append(step)
        y = step.first(self, chain, index, half_block, streams)
        if step.metas:
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
        steps = self.steps
        if self._filled is not None:
            steps[self._filled].empty()
        self._filled = index
        streams = self._streams_for(index)
        if streams.position == index:
            steps[index].refill(self, streams, index)
        while (position := streams.position) > index:
            step = steps[position - 1]
            step.undo(self, streams, fill=position == index + 1)
            if streams.position == position:
                break  # Nothing is ever asked for below the lowest one, which is not undone.
            for observer in self.observers:
                observer.after_undo(self, position - 1, step.half_block, streams)
        if (tail := steps[index].tail) is not None and tail.error:
            for observer in self.observers:
                observer.after_fill(self, index, streams)

    def _streams_for(self, index: int) -> StreamSnapshot:
        """Return the streams to walk back to half-block `index`: at it or above it."""
        held = self.held
        if self.keyframes:
            held = next((keyframe for keyframe in self.keyframes if keyframe.position >= index), held)
        assert held is not None
        while self._last_alive > index and not self.steps[self._last_alive].is_alive():
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
