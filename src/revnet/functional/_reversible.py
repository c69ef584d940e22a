"""The engine: reversible execution as a real autograd graph.

A chain of half-blocks, `y = x + f(other stream)`, runs forward in the ordinary way, but under saved-tensor hooks that
keep nothing of what autograd wants to save. Only the final pair of streams is held. When the backward pass first asks
for a saved tensor of a half-block, the run walks the streams back to it: it runs each residual function once more on
the stream that it read, under hooks that catch what autograd now saves again, and subtracts its output from the stream
that it wrote. It is `torch.utils.checkpoint(use_reentrant=False)` with the input rebuilt instead of stored. Since the
graph is the real one, hooks, partial gradients, retained graphs and double backward behave as they always do.

References:
    Gomez et al. (2017), The Reversible Residual Network, Algorithm 1.
"""

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from revnet._types import Streams
from revnet.engine import _chain
from revnet.engine.compile import compiled, runs_plainly
from revnet.errors import ReconstructionError
from revnet.functional._call import Call
from revnet.functional._drift import DriftWatch, warn_of_low_precision
from revnet.functional._guard import Guard
from revnet.functional._half_block import (
    HalfBlock,
    check_magnitude,
    check_range,
    join,
    residual_of,
    run_chain,
    without_receiver,
)
from revnet.functional._recompute import Conditions, tensors_in
from revnet.functional._storage import has_values, is_only_owner, largest_element, version_of


def stored(
    half_blocks: Sequence[HalfBlock], streams: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Streams:
    """Run half-blocks by ordinary autograd, which stores every activation: the twin of `reversible`.

    The same numbers at the price of memory that grows with depth; no time is spent on recomputation. Arguments, results
    and errors are those of `reversible`.
    """

    def advance(half_block: HalfBlock, streams: list[Tensor]) -> None:
        residual = residual_of(half_block, streams[half_block.reads_stream], args, kwargs)
        streams[half_block.updates] = join(half_block, streams[half_block.updates], residual)

    running = list(streams)
    run_chain(half_blocks, running, args, kwargs, advance)
    return tuple(running)


def reversible(
    half_blocks: Sequence[HalfBlock], streams: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Streams:
    """Run half-blocks and keep only the final streams; the backward pass rebuilds the rest.

    Args:
        half_blocks: The residual functions in order, each with the stream that it updates.
        streams: The streams, two or more. Not modified.
        args: Further positional arguments of every residual function.
        kwargs: Keyword arguments of every residual function.

    Returns:
        The streams after the last half-block. Modifying one in place before the backward pass makes that pass raise.

    Raises:
        TypeError: A residual function returned no tensor, or one of a dtype that the stream cannot hold.
        ValueError: A residual function returned another shape than that of the stream it updates.
        RuntimeError: A residual function modified its input in place.
        ReconstructionError: In the backward pass, the activations cannot be rebuilt. Never a wrong gradient instead.

    Numerics:
        The output is that of `stored`, bit for bit. Gradients differ by the rounding of `(x + r) - r`, which grows with
        depth.

    References:
        Gomez et al. (2017), The Reversible Residual Network, equations 6 and 7 and Algorithm 1.
    """
    return run_reversible(half_blocks, streams, args, kwargs)[0]


def inverse(
    half_blocks: Sequence[HalfBlock], streams: Sequence[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Streams:
    """Compute the streams before the half-blocks from those after them.

    Runs by ordinary autograd and is differentiable. Buffers (batch-norm statistics) are left as they are. In training
    mode batch norm uses the statistics of this batch, as the forward pass did; random functions such as dropout do
    not repeat the forward pass's draw, so invert those in evaluation mode.
    """
    running = list(streams)
    tensors = tensors_in(args, kwargs)
    for half_block in reversed(half_blocks):
        source = running[half_block.reads_stream]
        with Conditions(half_block.function, source, tensors).restored():
            residual = residual_of(half_block, source, args, kwargs)
        y = running[half_block.updates]
        check_magnitude(half_block, y)
        running[half_block.updates] = half_block.coupling.inverse(y, residual, half_block.name)
    return tuple(running)


def run_reversible(
    half_blocks: Sequence[HalfBlock],
    streams: Sequence[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    guard: Guard | None = None,
    *,
    keeps_input: bool = False,
) -> tuple[Streams, "ReversibleRun | None"]:
    """`reversible`, and the run that holds the final streams; None where autograd saved nothing.

    A `guard` bounds the error of what is rebuilt, where it can have one. A chain of one half-block that `keeps_input`
    holds it in place of what it returned: then nothing is rebuilt.
    """
    if not torch.is_grad_enabled() or runs_plainly():
        return stored(half_blocks, streams, args, kwargs), None
    if torch.compiler.is_dynamo_compiling():
        bound = _bound(half_blocks, args, kwargs)
        return compiled(bound, streams) or stored(half_blocks, streams, args, kwargs), None
    is_rebuilt = len(half_blocks) > 1  # Of one, nothing is.
    if not is_rebuilt or all(half_block.coupling.is_exact for half_block in half_blocks):
        guard = None
    elif guard is None:
        warn_of_low_precision(half_blocks[0], streams[0])
    if guard is not None and streams[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise NotImplementedError(
            "a ReversibleSequential with a `tolerance` cannot be captured in a CUDA graph: what it computes depends "
            "on what it measures; reverse exactly with `set_coupling(model, FixedPoint())`."
        )
    is_placing = guard is not None and has_values(streams[0]) and guard.begin(half_blocks[0].name)
    run = ReversibleRun(args, kwargs, is_watched=is_rebuilt, guard=guard, is_placing=is_placing)
    running = list(streams)
    before = streams if keeps_input else None
    del streams  # From here on the streams may be freed as soon as they are used.
    run_chain(half_blocks, running, args, kwargs, run.advance)
    if not run.needs_rebuilding:
        return tuple(running), None
    if before is not None:
        run.hold_input(before)
    else:
        run.hold(*running)
    return tuple(running), run


def _bound(half_blocks: Sequence[HalfBlock], args: tuple[Any, ...], kwargs: dict[str, Any]) -> "_chain.BoundChain":
    """Temporary: the chain that `compiled` takes."""
    chain = _chain.Chain(
        [
            _chain.HalfBlock(each.function, each.updates, each.reads_stream, each.name, each.coupling)
            for each in half_blocks
        ],
        [each.owner for each in half_blocks],
    )
    bound = chain.bind(args, kwargs)
    bound.input_dtype = half_blocks[0].reads
    bound.log_dets = half_blocks[0].log_dets
    return bound


class ReversibleRun:
    """One forward pass through a chain of half-blocks, able to rebuild what it did not keep."""

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_watched: bool, guard: Guard | None, is_placing: bool
    ):
        self._args = args
        self._kwargs = kwargs
        self._tensors = tensors_in(args, kwargs)
        self._steps: list[_Step] = []
        self._first_with_slots: int | None = None
        self._last_alive = -1
        self._held: _Streams | None = None
        self._walk: _Streams | None = None
        self._filled: int | None = None
        self._has_begun = False
        self._magnitudes: list[tuple[int, Tensor]] = []
        self._watch = DriftWatch(keeps_all=guard is not None) if is_watched else None
        self._guard = guard
        self._is_placing = is_placing
        self._keyframes: list[_Streams] = []  # Below the held pair, from the lowest up.
        self._references: list[_Streams] = []  # True pairs to go forward from again; the first is the lowest needed.
        self.lock = threading.RLock()

    @property
    def needs_rebuilding(self) -> bool:
        """Whether autograd saved anything that a backward pass could ask for."""
        return self._first_with_slots is not None

    @property
    def is_finished(self) -> bool:
        """Whether the final pair is known, from which all others are rebuilt."""
        return self._held is not None

    def advance(self, half_block: HalfBlock, streams: list[Tensor]) -> None:
        """Run the next half-block on `streams`, keeping none of its activations."""
        source, stream = streams[half_block.reads_stream], streams[half_block.updates]
        coupling, name = half_block.coupling, half_block.name
        call = Call(name, Conditions(half_block.function, source, self._tensors))
        index = len(self._steps)
        before = _Streams.of(index, streams) if self._guard is not None else None
        # Without the receiver of log-determinants: their graph refers to this run.
        self._steps.append(_Step(without_receiver(half_block), source.requires_grad, stream.requires_grad, call))

        def residual() -> Tensor:
            return residual_of(half_block, source, self._args, self._kwargs)

        if coupling.is_additive:
            y = coupling.forward(stream, call.first(self, index, residual, sources=(source,)), name)
        else:
            y = call.first(self, index, lambda: join(half_block, stream, residual()), sources=(source, stream))
        if call.saved_anything():
            self._last_alive = index
            if self._first_with_slots is None:
                self._first_with_slots = index
                self._references = [] if before is None else [before]
        if before is not None and self._first_with_slots not in (None, index):
            assert self._guard is not None
            if name in self._guard.keyframes and not self._is_placing:
                self._keyframes.append(before)
        if self._watch is not None and self._first_with_slots is not None:
            self._watch.keep(index, source)
        streams[half_block.updates] = y
        if coupling.is_exact:
            self._watch_range(index, y)

    def _begin(self) -> None:
        """Before anything is rebuilt: whether the forward pass left what can be."""
        if self._has_begun:
            return
        self._has_begun = True
        self._check_magnitudes()
        if self._watch is not None and self._held is not None:
            self._watch.begin(self._held.peek())
        if self._guard is not None and self._is_placing:
            self._guard.forget({step.half_block.name for step in self._steps})

    def _watch_range(self, index: int, y: Tensor) -> None:
        """Raise if a stream leaves the range in which it can be taken apart exactly, a GPU's in the backward pass."""
        half_block = self._steps[index].half_block
        magnitude = largest_element(y)
        if y.device.type in ("cpu", "meta"):
            if has_values(y):
                # A number; `float` would be an operation more than a prediction of the step has.
                value: Any = magnitude.tolist()
                check_range(half_block, value, y.dtype)
        elif torch.cuda.is_current_stream_capturing():
            limit = half_block.coupling.limit(y.dtype)
            assert limit is not None
            torch._assert_async(~(magnitude >= limit) | magnitude.isinf(), f"a stream reached {limit}: see FixedPoint")
        else:
            self._magnitudes.append((index, magnitude))  # Not to be waited for.

    def _check_magnitudes(self) -> None:
        """Raise if a stream of the forward pass left the range."""
        magnitudes, self._magnitudes = self._magnitudes, []
        if not magnitudes or not has_values(magnitudes[0][1]):
            return
        for (index, norm), magnitude in zip(magnitudes, torch.stack([m for _, m in magnitudes]).tolist(), strict=True):
            check_range(self._steps[index].half_block, magnitude, norm.dtype)

    def hold(self, *streams: Tensor) -> None:
        """Hold the final streams, or the same values seen through another tensor (the parts of the caller's output)."""
        layouts = self._held.layouts if self._held is not None else tuple(stream.stride() for stream in streams)
        held: list[Tensor | None] = [stream.detach() for stream in streams]
        last = self._steps[-1].half_block
        if self._first_with_slots == len(self._steps) - 1 and last.coupling.is_additive:
            # Only the last function runs again, and nothing below it: no stream but the one that it reads is needed.
            held = [stream if which == last.reads_stream else None for which, stream in enumerate(held)]
        self._held = _Streams(len(self._steps), held, layouts)

    def hold_input(self, streams: Sequence[Tensor]) -> None:
        """Hold what the only half-block began with."""
        (step,) = self._steps
        needed = (step.half_block.reads_stream, step.half_block.updates)
        held = [stream.detach() if which in needed else None for which, stream in enumerate(streams)]
        self._held = _Streams(0, held, tuple(stream.stride() for stream in streams))

    def rebuild(self, index: int) -> None:
        """Fill the slots of half-block `index`, walking the streams back to it."""
        self._begin()
        # Never the activations of two residual functions at once, even where nobody collects the first one's.
        if self._filled is not None:
            self._steps[self._filled].call.empty_slots()
        self._filled = index
        streams = self._streams_for(index)
        while streams.position > index + 1:
            self._step_back(streams, fill=False)
        if streams.position == index + 1:
            self._step_back(streams, fill=True)
        elif not self._steps[index].half_block.coupling.is_additive:
            self._recompute_joined(streams, index, fill=True)
        else:
            # Already past it, which left the stream that it reads as it was.
            self._recompute(streams, index, fill=True, needs_residual=False)

    def _streams_for(self, index: int) -> "_Streams":
        """The streams to walk back to half-block `index`, at the half-block or above it."""
        held = next((keyframe for keyframe in self._keyframes if keyframe.position >= index), self._held)
        assert held is not None
        assert held.position >= index
        while self._last_alive > index and not self._steps[self._last_alive].call.has_slots():
            self._last_alive -= 1
        if self._last_alive <= index:
            # Nobody can ask for anything above `index` again: the held pair itself may move.
            self._walk = None
            self._held = held
            if self._guard is not None:
                self._keyframes = [keyframe for keyframe in self._keyframes if keyframe.position < index]
                self._references = [reference for reference in self._references if reference.position <= index + 1]
            return held
        if self._walk is None or self._walk.position < index or held.position < self._walk.position:
            self._walk = held.fork()
            self._drop_walk_after_backward()
        return self._walk

    def _drop_walk_after_backward(self) -> None:
        run = weakref.ref(self)

        def drop() -> None:
            alive = run()
            if alive is not None:
                alive._walk = None
                del alive._references[1:]

        try:
            torch.autograd.Variable._execution_engine.queue_callback(drop)
        except RuntimeError:  # Not in a backward pass: somebody looks at `grad_fn._saved_*`.
            return

    def _step_back(self, streams: "_Streams", *, fill: bool) -> None:
        """Undo the half-block before `streams.position`; `fill` its slots on the way."""
        index = streams.position - 1
        is_needed = self._first_with_slots is not None and index > self._first_with_slots
        half_block = self._steps[index].half_block
        coupling = half_block.coupling
        if not coupling.is_additive:
            x = self._recompute_joined(streams, index, fill=fill)
            if is_needed:
                streams.put(half_block.updates, x)
                streams.position = index
            return
        residual = self._recompute(streams, index, fill=fill, needs_residual=is_needed)
        if residual is None:
            return
        y = streams.take(half_block.updates)
        try:
            x = coupling.inverse(y, residual, half_block.name, in_place=is_only_owner(y))
        except BaseException:
            streams.put(half_block.updates, y)
            raise
        streams.put(half_block.updates, x)
        streams.position = index

    def _recompute(self, streams: "_Streams", index: int, *, fill: bool, needs_residual: bool) -> Tensor | None:
        """Run residual function `index` again; returns its output if that is needed."""
        half_block = self._steps[index].half_block
        source = self._source(streams, index)
        residual: Tensor | None = self._steps[index].call.repeat(
            lambda: residual_of(half_block, source, self._args, self._kwargs),
            fill=fill,
            is_rounded=self._is_rounded(streams, index),
            needs_result=needs_residual,
        )
        return None if residual is None else residual.detach()

    def _recompute_joined(self, streams: "_Streams", index: int, *, fill: bool) -> Tensor:
        """Run residual function `index` again, and join what it returns to the stream before it, which is returned."""
        half_block, _, stream_requires_grad, call = self._steps[index]
        coupling, name = half_block.coupling, half_block.name
        source = self._source(streams, index)
        y_or_x = streams.read(half_block.updates)
        x = y_or_x if streams.position == index else None

        def compute() -> Tensor:
            nonlocal x
            residual = residual_of(half_block, source, self._args, self._kwargs)
            if x is None:
                with torch.no_grad():
                    x = coupling.inverse(y_or_x, residual, name)
            return join(without_receiver(half_block), x.detach().requires_grad_(stream_requires_grad), residual)

        is_rounded = self._is_rounded(streams, index)
        # The stream before it is known only once the function has run to its end.
        call.repeat(compute, fill=fill, is_rounded=is_rounded, needs_result=x is None or not fill)
        assert x is not None
        return x

    def _source(self, streams: "_Streams", index: int) -> Tensor:
        """What residual function `index` reads, as the leaf of its second run."""
        half_block, source_requires_grad, _, _ = self._steps[index]
        distance = streams.origin - 1 - index
        if self._watch is not None and distance > 0:
            if self._guard is not None:
                self._keep_to_the_truth(streams, index, self._guard)
            source = streams.read(half_block.reads_stream).detach()
            self._watch.compare(index, source, half_block, distance)
        else:
            source = streams.read(half_block.reads_stream).detach()
        return source.requires_grad_(source_requires_grad)

    def _is_rounded(self, streams: "_Streams", index: int) -> bool:
        """Whether what function `index` reads again carries the rounding of a reconstruction."""
        return streams.origin > index + 1 and not self._steps[index].half_block.coupling.is_exact

    # The guard --------------------------------------------------------------------------------------------------------

    def _keep_to_the_truth(self, streams: "_Streams", index: int, guard: Guard) -> None:
        """Unless what function `index` reads is near enough to what it read, put the true pair into `streams`."""
        assert self._watch is not None
        source = self._steps[index].half_block.reads_stream
        error = self._watch.error_of(index, streams.read(source))
        if error is None or not has_values(error) or not guard.is_broken(float(error), is_placing=self._is_placing):
            return
        position = index + 1
        name = self._steps[position].half_block.name
        is_alone = streams.origin - position == 1
        streams.become(self._true_pair(position))
        true_error = float(self._watch.error_of(index, streams.read(source)))  # type: ignore[arg-type]
        if math.isnan(true_error):  # The model's own, which no keyframe mends.
            self._guard = None
        elif true_error > 0 and guard.is_broken(true_error, is_placing=False):
            raise ReconstructionError(
                f"the stream before `{name}` has a relative error of {true_error:.1g} though it was computed as in the "
                "forward pass: a residual function gives other numbers when it runs again. Set "
                "`torch.use_deterministic_algorithms(True)`; `revnet.numerics.find_nondeterministic` names it."
            )
        else:
            guard.place(name)
            if is_alone:
                guard.tell_alone(name, float(error))
            if streams is not self._held:  # The graph is retained: next time, from here.
                above = [keyframe for keyframe in self._keyframes if keyframe.position > position]
                self._keyframes = [*self._keyframes[: -len(above) or None], streams.fork(), *above]

    def _true_pair(self, position: int) -> "_Streams":
        """The pair at `position` as the forward pass had it: from the nearest true one below it, forward again."""
        below = [each for each in (*self._references, *self._keyframes) if each.position <= position]
        pair = max(below, key=lambda each: each.position).fork()
        # Pairs on the way that may be asked for next, few enough, and near enough to go on from.
        spacing = max(1, math.isqrt(position - pair.position))
        while pair.position < position:
            pair = self._step_forward(pair)
            if pair.position < position and (position - pair.position) % spacing == 0:
                self._references.append(pair)
        return pair

    def _step_forward(self, pair: "_Streams") -> "_Streams":
        """The pair behind the next half-block."""
        half_block, source_requires_grad, stream_requires_grad, call = self._steps[pair.position]
        source = pair.read(half_block.reads_stream).detach().requires_grad_(source_requires_grad)
        x = pair.read(half_block.updates).detach()
        coupling, name = half_block.coupling, half_block.name

        def compute() -> Tensor:
            residual = residual_of(half_block, source, self._args, self._kwargs)
            if coupling.is_additive:
                return residual
            return join(without_receiver(half_block), x.detach().requires_grad_(stream_requires_grad), residual)

        result = call.repeat(compute, fill=False, is_rounded=False, needs_result=True).detach()
        y = coupling.forward(x, result, name) if coupling.is_additive else result
        streams = [y if which == half_block.updates else pair.read(which) for which in range(len(pair.layouts))]
        return _Streams.of(pair.position + 1, streams)


class _Step(NamedTuple):
    """A half-block that has run."""

    half_block: HalfBlock
    source_requires_grad: bool
    stream_requires_grad: bool
    call: Call


class _Streams:
    """A pair of streams at a position in the chain: `position` half-blocks lie before it."""

    def __init__(self, position: int, tensors: Sequence[Tensor | None], layouts: tuple[tuple[int, ...], ...]):
        self.position = position
        self.origin = position
        """The position at which the pair was true; from there it was rebuilt."""
        self.layouts = layouts
        self._tensors = list(tensors)
        self._versions = [0 if tensor is None else version_of(tensor) for tensor in tensors]

    @classmethod
    def of(cls, position: int, streams: Sequence[Tensor]) -> "_Streams":
        """The pair of `streams`, as they lie."""
        return cls(position, [each.detach() for each in streams], tuple(each.stride() for each in streams))

    def fork(self) -> "_Streams":
        """The same pair, to be walked back on its own. It sees the same memory, so neither writes to it."""
        held = [None if tensor is None else self.read(which).detach() for which, tensor in enumerate(self._tensors)]
        fork = _Streams(self.position, held, self.layouts)
        fork.origin = self.origin
        return fork

    def become(self, other: "_Streams") -> None:
        """Be the pair that `other` is, which is given up."""
        self.position, self.origin, self.layouts = other.position, other.origin, other.layouts
        self._tensors, self._versions = other._tensors, other._versions

    def read(self, which: int) -> Tensor:
        """One stream, laid out as the forward pass laid it out."""
        self._check_version(which)
        tensor = self._tensors[which]
        assert tensor is not None
        if tensor.stride() != self.layouts[which]:
            # All at once: parts of one output share its memory, of which none would let go alone.
            for each, other in enumerate(self._tensors):
                if other is not None and other.stride() != self.layouts[each]:
                    self._check_version(each)
                    dense = torch.empty_strided(other.shape, self.layouts[each], dtype=other.dtype, device=other.device)
                    self.put(each, dense.copy_(other))
            tensor = self._tensors[which]
            assert tensor is not None
        return tensor

    def _check_version(self, which: int) -> None:
        tensor = self._tensors[which]
        if tensor is not None and version_of(tensor) != self._versions[which]:
            raise ReconstructionError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: an "
                f"output of a reversible sequence, of shape {tuple(tensor.shape)}, is at version {version_of(tensor)}; "
                f"expected version {self._versions[which]}. The activations are rebuilt from that output: use the "
                "operation's out-of-place form, or the policy `Store()` for the last block."
            )

    def peek(self) -> list[Tensor | None]:
        """The streams as they lie, those that are held."""
        return self._tensors

    def take(self, which: int) -> Tensor:
        """`read` without keeping it, so that the caller is its only owner unless somebody else sees the memory."""
        tensor = self.read(which)
        self._tensors[which] = None
        return tensor

    def put(self, which: int, tensor: Tensor) -> None:
        self._tensors[which] = tensor
        self._versions[which] = version_of(tensor)
