"""The run of a chain, which records the forward pass and walks the streams back; and the step of most half-blocks."""

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from revnet._torch_internals import forward_mode_level, in_functorch_transform, is_vmapped
from revnet._torch_release import is_exporting
from revnet._types import Streams
from revnet.coupling import Additive
from revnet.engine import _careful
from revnet.engine._agreement import AgreementWatch
from revnet.engine._block_hooks import run_through_blocks
from revnet.engine._chain import BoundChain, HalfBlock, stored, wrote_to_input
from revnet.engine._digest import can_digest
from revnet.engine._drift import active_meter
from revnet.engine._moves import prepare, put_back
from revnet.engine._observer import Observer
from revnet.engine._observers import correct, observers_of
from revnet.engine._random import cpu_random_state, memory_of
from revnet.engine._replay import replay
from revnet.engine._retained import streams_for
from revnet.engine._step import AbstractFunctionStep, AbstractStep, JoinedStep
from revnet.engine._streams import StreamSnapshot
from revnet.engine._surroundings import Surroundings
from revnet.engine._tensors import ALONE, PLAIN, use_count
from revnet.engine.compile import compiled


def reversible(chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
    """Run the half-blocks and keep only the final streams; the backward pass rebuilds the others.

    It takes the arguments of `stored`, and returns the same bits. Gradients differ by the rounding of `(x + r) - r`.

    Raises:
        ReconstructionError: In the backward pass, something was modified or cannot be rebuilt.

    References:
        Gomez et al. (2017), The Reversible Residual Network, equations 6 and 7 and Algorithm 1.
    """
    if is_exporting() or torch.jit.is_tracing() or not torch.is_grad_enabled():  # type: ignore[attr-defined]
        return stored(chain, streams)
    if torch.compiler.is_dynamo_compiling():
        return compiled(chain, streams) or stored(chain, streams)
    if in_functorch_transform() and is_vmapped():
        return stored(chain, streams)
    return (chain.recorder or Rebuilder(chain, streams)).run(chain, streams)


class Rebuilder:
    """One forward pass through a chain, which can rebuild what it did not keep.

    The autograd graph owns it (rule 1). It records the half-blocks as steps, holds the final streams, and walks them
    back when the backward pass asks for a slot: in any order, repeatedly, and from several threads.
    """

    undoes_all = False  # Whether to undo the lowest half-block, too; see `RecordedRun`.

    def __init__(self, chain: BoundChain, streams: Sequence[Tensor]):
        self.chain = chain if chain.is_plain and chain.log_dets is None else chain.for_replays()
        self.has_log_dets = chain.log_dets is not None
        chain.chain.num_runs += 1
        meter = active_meter()
        is_usual = len(chain.chain.half_blocks) > 1 and chain.tolerance is None and not chain.chain.has_exact
        is_usual = is_usual and meter is None and streams[0].dtype is torch.float32 and can_digest(streams[0])
        self.observers: list[Observer] = [AgreementWatch()] if is_usual else observers_of(chain, streams)
        can_read = streams[0].device.type == "cpu" or AgreementWatch in map(type, self.observers)
        self.is_watched = can_read and (meter is None or not meter.is_quiet)
        """Whether the values of saved tensors are compared, and a difference raises."""
        self.correctors = list(filter(attrgetter("looks_before_replays"), self.observers))
        """Observers that may replace the streams before a function runs again."""
        is_usual = streams[0].device.type == "cpu" and chain.is_plain and forward_mode_level() < 0
        if is_usual and not torch.is_autocast_enabled("cpu"):
            state = cpu_random_state()
            self.surroundings = Surroundings(random=(state, bytearray(memory_of(state.data_ptr())), ()))
        else:
            self.surroundings = Surroundings.of(self.chain.replayed, streams)
        self.steps: list[AbstractStep] = []
        self.lowest = -1
        """Lowest half-block for which autograd saved a tensor, or -1. Nothing below it is ever rebuilt."""
        self.keyframes: list[StreamSnapshot] = []
        """Streams held below the final ones, lowest first."""
        self.held: StreamSnapshot | None = None
        """Final streams, from which all others are rebuilt; None until the forward pass is over."""
        self.walk: StreamSnapshot | None = None
        """Fork of the held streams, which is walked back while the graph is retained."""
        self.is_finished = self.is_checking = False
        """Whether the forward pass is over; and whether an observer is running functions again to compare results."""
        self.lock = threading.RLock()
        self.last_alive = -1
        """Highest half-block for which a backward pass may still ask for a tensor."""
        self._strides: list[tuple[int, ...]] = []
        self._filled: int | None = None

    def run(self, chain: BoundChain, streams: Sequence[Tensor]) -> Streams:
        """Run the chain, and keep only the final streams."""
        running = chain.chain.list_streams(streams)
        del streams  # From here on, a stream may be freed as soon as it is used.
        if chain.chain.blocks is None:
            for index in range(len(chain.chain.half_blocks)):
                self._advance(chain, index, running)
        else:
            run_through_blocks(chain, running, partial(self._advance, chain))
        final = tuple(running)
        if self.lowest >= 0:
            self._strides = [stream.stride() for stream in final]
            if not chain.is_joined:
                self.hold(final)
            chain.run = weakref.ref(self)  # The graph owns the run (rule 1).
        return final

    def _advance(self, chain: BoundChain, index: int, streams: list[Tensor]) -> None:
        half_block, plans, surroundings = chain.chain.half_blocks[index], chain.chain.plans, self.surroundings
        if chain.chain.may_draw:
            half_block = chain.chain.prepare(half_block, streams, surroundings)
        kind: type[AbstractStep] = LinearStep if half_block.coupling.is_linear else JoinedStep
        step = kind(half_block.name, plans[index], half_block.function, surroundings)
        plans[index], step.held_before = step.plan, None
        if chain.chain.moves is not None:
            prepare(self, chain, step, index, streams)
        self.steps.append(step)
        y = step.first(self, chain, index, half_block, streams)
        if step.metas:
            self.last_alive = index
            if self.lowest < 0:
                self.lowest = index
        for observer in self.observers:
            observer.on_forward(self, index, half_block, streams, y)
        streams[half_block.target] = y

    def hold(self, streams: Sequence[Tensor], whole: Tensor | None = None) -> None:
        """Hold the final streams, or other tensors with the same values: the parts of the joined output, `whole`."""
        held: list[Tensor | None] = [stream.detach() for stream in streams]  # A node would lead back here (rule 1).
        last = self.steps[-1].half_block
        if self.lowest == len(self.steps) - 1 and last.coupling.is_linear:
            # Only the last function runs again, and it needs only the stream that it reads.
            held, whole = [stream if number in last.sources else None for number, stream in enumerate(held)], None
        self.held = StreamSnapshot(len(self.steps), held, self._strides)
        self.is_finished = True
        for observer in self.observers:
            observer.on_hold(held, whole)

    def rebuild(self, index: int) -> None:
        """Fill the slots of half-block `index`, and walk the streams back to it."""
        if not self.is_finished:
            _careful.check_finished(False)
        if self._filled is None:  # This is the first request.
            assert self.held is not None
            self.held.check_memory()
            for observer in self.observers:
                observer.before_rebuild(self)
        steps, last = self.steps, self.last_alive
        # One function's activations at a time, even if the slots of the last one were not read (rule 3).
        if self._filled is not None and (saved := steps[self._filled].saved()) is not None:
            saved.tensors = saved.versions = None
        self._filled = index
        while last > index and steps[last].saved() is None:  # Its slots no longer exist, so no one can ask for them.
            last -= 1
        self.last_alive = last
        if last > index or self.keyframes:
            streams = streams_for(self, index)
        else:  # Nothing above can be asked for again, so the held streams may move.
            assert self.held is not None
            self.walk, streams = None, self.held
        if streams.position == streams.origin:  # A new walk. Numbers drawn since must not affect the replays.
            state, others = cpu_random_state(), self.surroundings.others
            if others or steps[0].before[1] != memory_of(state.data_ptr()):
                self.surroundings.look_at_random_states(steps[0].before)
        if streams.position == index:  # Already undone, and asked for again.
            steps[index].refill(self, streams, index)
        while (position := streams.position) > index:
            step = steps[position - 1]
            step.undo(self, streams, fill=position == index + 1)
            if streams.position == position:
                break  # The lowest half-block is not undone.
            for observer in self.observers:
                observer.after_undo(self, position - 1, step.half_block, streams)
        if (tail := steps[index].tail) is not None and (tail.error or tail.suspects):
            for observer in self.observers:
                observer.after_fill(self, index, streams)

    def source_of(self, step: AbstractStep, streams: StreamSnapshot, index: int) -> tuple[Tensor, bool]:
        """Return the stream that a step's function reads, as a leaf, and whether it carries rounding."""
        if self.correctors:
            correct(self, index, streams)
        # `data` has its own version counter; the stream's counter rises when it is overwritten later.
        source = streams.read(step.half_block.source).data.requires_grad_(step.source_requires_grad)
        # A corrector may have replaced the streams by exact ones.
        return source, index + 1 != streams.origin and not step.half_block.coupling.is_exact


class LinearStep(AbstractFunctionStep):
    """A half-block whose coupling saves nothing for its gradient."""

    __slots__ = ()

    def first(
        self, run: "Rebuilder", chain: BoundChain, index: int, half_block: HalfBlock, streams: Sequence[Tensor]
    ) -> Tensor:
        """Return the updated stream, and leave slots of the function in the graph."""
        self.half_block = half_block
        source, stream = streams[half_block.source], streams[half_block.target]
        self.source_requires_grad = source.requires_grad
        is_plain, version, is_watched = chain.is_plain, source._version, run.is_watched
        may_stop = run.lowest < 0 or self.held_before is not None
        function: Callable[..., Any] = half_block.function if is_plain else chain.call
        args, own = ((source,), (source,)) if is_plain else ((half_block, source), (source, *run.chain.inputs))
        residual = self.record(run, index, function, args, own, may_stop_early=may_stop, keeps_tail=is_watched)
        if is_plain and source._version != version:
            raise wrote_to_input(half_block)
        # Does what the coupling does, without its checks, which cost more than the sum of small tensors.
        is_usual = type(half_block.coupling) is Additive and type(residual) is Tensor
        if is_usual and residual.dtype == stream.dtype and residual.shape == stream.shape:
            return stream + residual
        keeper = None if may_stop and not run.undoes_all else self
        return chain.join(half_block, stream, residual, chain.log_dets, keeper)

    def undo(self, run: "Rebuilder", streams: StreamSnapshot, *, fill: bool) -> None:
        """Run the function again, and subtract its result from the stream."""
        index, half_block = streams.position - 1, self.half_block
        if self.held_before is not None:
            put_back(run, self, streams, fill=fill)
            return
        is_needed = index > run.lowest or run.undoes_all
        residual = self.run_again(run, streams, index, fill=fill, needs_result=is_needed)
        if not is_needed:
            return
        y = streams.read(half_block.target)
        streams.held[half_block.target] = None  # So that `y` is its only owner, unless another tensor sees the memory.
        try:
            # Overwritten only if nothing else refers to its storage (rule 5).
            in_place = ALONE is not None and type(y) in PLAIN and use_count(y.untyped_storage()._cdata) == ALONE
            if type(half_block.coupling) is Additive and residual.dtype == y.dtype and type(y) is Tensor:
                x = y.sub_(residual) if in_place else y - residual
            else:
                x = self.part(y, residual, in_place=in_place)
        except BaseException:
            streams.put(half_block.target, y)  # So that another backward pass can try again.
            raise
        streams.put(half_block.target, x)
        streams.position = index

    def run_again(
        self, run: "Rebuilder", streams: StreamSnapshot, index: int, *, fill: bool, needs_result: bool
    ) -> Any:
        chain, half_block = run.chain, self.half_block
        source, is_rounded = run.source_of(self, streams, index)
        function: Callable[..., Any] = half_block.function if chain.is_plain else chain.call
        args = (source,) if chain.is_plain else (half_block, source)
        residual = replay(self, function, args, fill=fill, is_rounded=is_rounded, needs_result=needs_result)
        if chain.is_plain and source._version:
            raise wrote_to_input(half_block)
        return residual.detach() if residual is not None and torch.is_grad_enabled() else residual
