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

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from revnet._types import TensorPair
from revnet.errors import ReconstructionError
from revnet.functional._compiled import compiled
from revnet.functional._coupling import additive, additive_inverse
from revnet.functional._half_block import HalfBlock, residual_of
from revnet.functional._recompute import Conditions
from revnet.functional._storage import is_only_owner, version_of


def stored(
    half_blocks: Sequence[HalfBlock], x1: Tensor, x2: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> TensorPair:
    """Run half-blocks by ordinary autograd, which stores every activation: the twin of `reversible`.

    The same numbers at the price of memory that grows with depth; no time is spent on recomputation. Arguments, results
    and errors are those of `reversible`.
    """
    streams = [x1, x2]
    for half_block in half_blocks:
        source = streams[1 - half_block.updates]
        residual = residual_of(half_block, source, args, kwargs)
        streams[half_block.updates] = additive(streams[half_block.updates], residual, half_block.name)
    return streams[0], streams[1]


def reversible(
    half_blocks: Sequence[HalfBlock], x1: Tensor, x2: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> TensorPair:
    """Run half-blocks and keep only the final pair of streams; the backward pass rebuilds the rest.

    Args:
        half_blocks: The residual functions in order, each with the stream that it updates.
        x1: The first stream. Not modified.
        x2: The second stream. Not modified.
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
    y1, y2, _ = run_reversible(half_blocks, x1, x2, args, kwargs)
    return y1, y2


def inverse(
    half_blocks: Sequence[HalfBlock], y1: Tensor, y2: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> TensorPair:
    """Compute the streams before the half-blocks from those after them.

    Runs by ordinary autograd and is differentiable. Buffers (batch-norm statistics) are left as they are. In training
    mode batch norm uses the statistics of this batch, as the forward pass did; random functions such as dropout do
    not repeat the forward pass's draw, so invert those in evaluation mode.
    """
    streams = [y1, y2]
    for half_block in reversed(half_blocks):
        source = streams[1 - half_block.updates]
        with Conditions(half_block.function, source, (args, kwargs)).restored():
            residual = residual_of(half_block, source, args, kwargs)
        streams[half_block.updates] = additive_inverse(streams[half_block.updates], residual, half_block.name)
    return streams[0], streams[1]


def run_reversible(
    half_blocks: Sequence[HalfBlock], x1: Tensor, x2: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor, "ReversibleRun | None"]:
    """`reversible`, and the run that holds the final pair; None where autograd saved nothing."""
    if not torch.is_grad_enabled():
        return *stored(half_blocks, x1, x2, args, kwargs), None
    if torch.compiler.is_dynamo_compiling():
        return *compiled(half_blocks, x1, x2, args, kwargs), None
    run = ReversibleRun(args, kwargs)
    streams = [x1, x2]
    del x1, x2  # From here on the streams may be freed as soon as they are used.
    for half_block in half_blocks:
        source = streams[1 - half_block.updates]
        residual = run.call(half_block, source)
        streams[half_block.updates] = additive(streams[half_block.updates], residual, half_block.name)
        del source, residual
    y1, y2 = streams
    if not run.needs_rebuilding:
        return y1, y2, None
    run.hold(y1, y2)
    return y1, y2, run


class ReversibleRun:
    """One forward pass through a chain of half-blocks, able to rebuild what it did not keep.

    The autograd graph owns the run: each saved tensor is a slot that refers to it, and nothing else does, so it is
    freed with the graph. The run refers to the slots weakly.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._args = args
        self._kwargs = kwargs
        self._calls: list[_Call] = []
        self._first_with_slots: int | None = None
        self._last_alive = -1
        self._held: _Streams | None = None
        self._walk: _Streams | None = None
        self._filled: int | None = None
        self._lock = threading.RLock()  # Several devices run several backward threads over one graph.

    @property
    def needs_rebuilding(self) -> bool:
        """Whether autograd saved anything that a backward pass could ask for."""
        return self._first_with_slots is not None

    def call(self, half_block: HalfBlock, source: Tensor) -> Tensor:
        """Run the next half-block's residual function, keeping none of its activations."""
        call = _Call(
            half_block,
            source.requires_grad,
            Conditions(half_block.function, source, (self._args, self._kwargs)),
        )
        index = len(self._calls)
        self._calls.append(call)

        def pack(tensor: Tensor) -> "_Slot | _Lasting":
            if call.conditions.is_lasting(tensor):
                return _Lasting(tensor, version_of(tensor))
            slot = _Slot(self, index, tensor)
            call.slots.append(weakref.ref(slot))
            call.layouts.append(_Layout.of(tensor))
            return slot

        with saved_tensors_hooks(pack, _unpack):
            residual = residual_of(half_block, source, self._args, self._kwargs)
        call.conditions.settle()
        call.empty_slots()  # Filled until here for functions that differentiate inside themselves.
        if call.slots:
            self._last_alive = index
            if self._first_with_slots is None:
                self._first_with_slots = index
        return residual

    def hold(self, y1: Tensor, y2: Tensor) -> None:
        """Hold the final pair, or the same values seen through another tensor (the halves of the caller's output)."""
        layouts = self._held.layouts if self._held is not None else (y1.stride(), y2.stride())
        streams: list[Tensor | None] = [y1.detach(), y2.detach()]
        if self._first_with_slots == len(self._calls) - 1:
            # Only the last function runs again, and nothing below it: the stream that it updates is never read.
            streams[self._calls[-1].half_block.updates] = None
        self._held = _Streams(len(self._calls), streams, layouts)

    def unpack(self, slot: "_Slot") -> Tensor:
        """The tensor of a slot, rebuilt if it is not there; it is given away, and rebuilt if asked for again."""
        with self._lock:
            if self._held is None:
                if slot.tensor is None:
                    raise ReconstructionError(
                        "backward reached a reversible sequence whose forward pass has not finished; call it outside "
                        "of the residual functions."
                    )
                return slot.tensor
            if slot.tensor is None:
                self._rebuild(slot.index)
            tensor, slot.tensor = slot.tensor, None
            assert tensor is not None
            return tensor

    def _rebuild(self, index: int) -> None:
        """Fill the slots of half-block `index`, walking the streams back to it."""
        # Never the activations of two residual functions at once, even where nobody collects the first one's.
        if self._filled is not None:
            self._calls[self._filled].empty_slots()
        self._filled = index
        streams = self._streams_for(index)
        while streams.position > index + 1:
            self._step_back(streams, fill=False)
        if streams.position == index + 1:
            self._step_back(streams, fill=True)
        else:
            # Already past it, which left the stream that it reads as it was.
            self._recompute(streams, index, fill=True, needs_residual=False)

    def _streams_for(self, index: int) -> "_Streams":
        """The streams to walk back to half-block `index`, at the half-block or above it."""
        held = self._held
        assert held is not None
        assert held.position >= index
        while self._last_alive > index and not self._calls[self._last_alive].has_slots():
            self._last_alive -= 1
        if self._last_alive <= index:
            # Nobody can ask for anything above `index` again: the held pair itself may move.
            self._walk = None
            return held
        if self._walk is None or self._walk.position < index:
            self._walk = held.fork()
            self._drop_walk_after_backward()
        return self._walk

    def _drop_walk_after_backward(self) -> None:
        run = weakref.ref(self)

        def drop() -> None:
            alive = run()
            if alive is not None:
                alive._walk = None

        try:
            torch.autograd.Variable._execution_engine.queue_callback(drop)
        except RuntimeError:  # Not in a backward pass: somebody looks at `grad_fn._saved_*`.
            return

    def _step_back(self, streams: "_Streams", *, fill: bool) -> None:
        """Undo the half-block before `streams.position`; `fill` its slots on the way."""
        index = streams.position - 1
        needs_residual = self._first_with_slots is not None and index > self._first_with_slots
        residual = self._recompute(streams, index, fill=fill, needs_residual=needs_residual)
        if residual is None:
            return
        half_block = self._calls[index].half_block
        y = streams.take(half_block.updates)
        try:
            x = additive_inverse(y, residual, half_block.name, in_place=is_only_owner(y))
        except BaseException:
            streams.put(half_block.updates, y)
            raise
        streams.put(half_block.updates, x)
        streams.position = index

    def _recompute(self, streams: "_Streams", index: int, *, fill: bool, needs_residual: bool) -> Tensor | None:
        """Run residual function `index` again; returns its output if that is needed."""
        call = self._calls[index]
        half_block = call.half_block
        source = streams.read(1 - half_block.updates).detach().requires_grad_(call.source_requires_grad)
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            if call.conditions.is_lasting(tensor):
                return tensor
            call.check(count, tensor)
            slot = call.slots[count]() if fill else None
            count += 1
            tensor = tensor.detach()
            if slot is not None:
                slot.tensor = tensor
            if not needs_residual and count == len(call.slots):
                raise _AllSlotsFilled
            return tensor

        try:
            with torch.enable_grad(), call.conditions.restored(), saved_tensors_hooks(pack, _identity):
                residual = residual_of(half_block, source, self._args, self._kwargs).detach()
        except _AllSlotsFilled:
            return None
        call.check_count(count)
        return residual if needs_residual else None


class _Slot:
    """What the autograd graph holds in place of a saved tensor."""

    __slots__ = ("__weakref__", "index", "run", "tensor")

    def __init__(self, run: ReversibleRun, index: int, tensor: Tensor | None):
        self.run = run
        self.index = index
        self.tensor = tensor

    def unpack(self) -> Tensor:
        return self.run.unpack(self)


class _Lasting(NamedTuple):
    """A saved tensor that outlives the half-block anyway: kept as it is, and guarded as autograd would guard it."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        if version_of(self.tensor) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"parameter, buffer or argument of a residual function, of shape {tuple(self.tensor.shape)}, is at "
                f"version {version_of(self.tensor)}; expected version {self.version} instead."
            )
        return self.tensor


def _unpack(packed: _Slot | _Lasting) -> Tensor:
    return packed.unpack()


def _identity(tensor: Tensor) -> Tensor:
    return tensor


class _AllSlotsFilled(Exception):  # noqa: N818 - not an error: it ends a recomputation of which the rest is not needed.
    pass


class _Layout(NamedTuple):
    """What a recomputed tensor must share with the one that the forward pass saved."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "_Layout":
        return cls(tensor.shape, tensor.dtype, tensor.device)


class _Call:
    """One call of a residual function: how to repeat it, and the slots of what autograd saved."""

    def __init__(self, half_block: HalfBlock, source_requires_grad: bool, conditions: Conditions):
        self.half_block = half_block
        self.source_requires_grad = source_requires_grad
        self.conditions = conditions
        self.slots: list[weakref.ref[_Slot]] = []
        self.layouts: list[_Layout] = []

    def has_slots(self) -> bool:
        """Whether a backward pass can still ask for any of the slots."""
        return any(slot() is not None for slot in self.slots)

    def empty_slots(self) -> None:
        """Forget the tensors of the slots that are still there."""
        for reference in self.slots:
            slot = reference()
            if slot is not None:
                slot.tensor = None

    def check(self, count: int, tensor: Tensor) -> None:
        """Raise unless `tensor` can be the one that the forward pass saved as number `count`."""
        if count >= len(self.slots):
            self._raise(f"saved more than the {len(self.slots)} tensors that the forward pass saved")
        if _Layout.of(tensor) != self.layouts[count]:
            then, now = self.layouts[count], _Layout.of(tensor)
            self._raise(
                f"saved {tuple(now.shape)} {now.dtype} on {now.device} where the forward pass saved "
                f"{tuple(then.shape)} {then.dtype} on {then.device}"
            )

    def check_count(self, count: int) -> None:
        """Raise unless the recomputation saved as many tensors as the forward pass."""
        if count != len(self.slots):
            self._raise(f"saved {count} tensors where the forward pass saved {len(self.slots)}")

    def _raise(self, difference: str) -> NoReturn:
        raise ReconstructionError(
            f"`{self.half_block.name}` did something else when it ran again: it {difference}. A residual function must "
            "do the same both times (no counters, caches or conditions that change); otherwise keep its block's "
            "activations with the policy `Store()`."
        )


class _Streams:
    """A pair of streams at a position in the chain: `position` half-blocks lie before it."""

    def __init__(
        self, position: int, tensors: Sequence[Tensor | None], layouts: tuple[tuple[int, ...], tuple[int, ...]]
    ):
        self.position = position
        self.layouts = layouts
        self._tensors = list(tensors)
        self._versions = [0 if tensor is None else version_of(tensor) for tensor in tensors]

    def fork(self) -> "_Streams":
        """The same pair, to be walked back on its own. It sees the same memory, so neither writes to it."""
        held = [None if tensor is None else self.read(which).detach() for which, tensor in enumerate(self._tensors)]
        return _Streams(self.position, held, self.layouts)

    def read(self, which: int) -> Tensor:
        """Stream 0 or 1, laid out as the forward pass laid it out."""
        tensor = self._tensors[which]
        assert tensor is not None
        if version_of(tensor) != self._versions[which]:
            raise ReconstructionError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: an "
                f"output of a reversible sequence, of shape {tuple(tensor.shape)}, is at version {version_of(tensor)}; "
                f"expected version {self._versions[which]}. The activations are rebuilt from that output: use the "
                "operation's out-of-place form, or the policy `Store()` for the last block."
            )
        if tensor.stride() != self.layouts[which]:
            dense = torch.empty_strided(tensor.shape, self.layouts[which], dtype=tensor.dtype, device=tensor.device)
            tensor = dense.copy_(tensor)
            self.put(which, tensor)
        return tensor

    def take(self, which: int) -> Tensor:
        """`read` without keeping it, so that the caller is its only owner unless somebody else sees the memory."""
        tensor = self.read(which)
        self._tensors[which] = None
        return tensor

    def put(self, which: int, tensor: Tensor) -> None:
        self._tensors[which] = tensor
        self._versions[which] = version_of(tensor)
