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
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from revnet._types import TensorPair
from revnet.errors import ReconstructionError
from revnet.functional._compiled import compiled
from revnet.functional._coupling import additive, additive_inverse
from revnet.functional._half_block import HalfBlock, residual_of, run_chain
from revnet.functional._recompute import Conditions
from revnet.functional._storage import is_only_owner, storage_key, version_of


def stored(
    half_blocks: Sequence[HalfBlock], x1: Tensor, x2: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> TensorPair:
    """Run half-blocks by ordinary autograd, which stores every activation: the twin of `reversible`.

    The same numbers at the price of memory that grows with depth; no time is spent on recomputation. Arguments, results
    and errors are those of `reversible`.
    """

    def advance(half_block: HalfBlock, streams: list[Tensor]) -> None:
        residual = residual_of(half_block, streams[1 - half_block.updates], args, kwargs)
        streams[half_block.updates] = additive(streams[half_block.updates], residual, half_block.name)

    streams = [x1, x2]
    run_chain(half_blocks, streams, args, kwargs, advance)
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
    tensors = _tensors_in(args, kwargs)
    for half_block in reversed(half_blocks):
        source = streams[1 - half_block.updates]
        with Conditions(half_block.function, source, tensors).restored():
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
        streams_within = compiled(half_blocks, x1, x2, args, kwargs) or stored(half_blocks, x1, x2, args, kwargs)
        return *streams_within, None
    run = ReversibleRun(args, kwargs)
    streams = [x1, x2]
    del x1, x2  # From here on the streams may be freed as soon as they are used.

    def advance(half_block: HalfBlock, streams: list[Tensor]) -> None:
        residual = run.call(half_block, streams[1 - half_block.updates])
        streams[half_block.updates] = additive(streams[half_block.updates], residual, half_block.name)

    run_chain(half_blocks, streams, args, kwargs, advance)
    y1, y2 = streams
    if not run.needs_rebuilding:
        return y1, y2, None
    run.hold(y1, y2)
    return y1, y2, run


def _tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)] if args or kwargs else []


class ReversibleRun:
    """One forward pass through a chain of half-blocks, able to rebuild what it did not keep.

    The autograd graph owns the run: each saved tensor is a slot that refers to it, and nothing else does, so it is
    freed with the graph. The run refers to the slots weakly.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self._args = args
        self._kwargs = kwargs
        self._tensors = _tensors_in(args, kwargs)
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
            Conditions(half_block.function, source, self._tensors),
        )
        index = len(self._calls)
        self._calls.append(call)

        def pack(tensor: Tensor) -> "_Slot | _Lasting":
            if call.conditions.is_lasting(tensor):
                return _Lasting(tensor, version_of(tensor))
            # Filled until the function is done, for those that differentiate inside themselves.
            slot = _Slot(self, index, tensor)
            call.slots.append(weakref.ref(slot))
            call.layouts.append(_Layout.of(tensor))
            call.origins.append(_Origin(tensor))
            return slot

        start = torch._C._autograd._get_sequence_nr()
        with saved_tensors_hooks(pack, _unpack):
            residual = residual_of(half_block, source, self._args, self._kwargs)
        call.conditions.settle()
        call.residual = _Layout.of(residual) if isinstance(residual, Tensor) else None
        call.empty_slots()
        call.keep_what_is_not_its_own(start, source, residual)
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
                slot.check_version()
                return slot.tensor
            if slot.tensor is None:
                self._rebuild(slot.index)
            tensor = slot.tensor
            assert tensor is not None
            slot.check_version()
            if not slot.is_constant:
                slot.tensor = None
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
            if slot is not None and not slot.is_constant:
                slot.fill(tensor)
            return tensor

        is_rounded = streams.position < len(self._calls)  # The last half-block reads what the forward pass left.
        with torch.enable_grad(), call.conditions.restored(is_rounded), saved_tensors_hooks(pack, _identity):
            residual = residual_of(half_block, source, self._args, self._kwargs)
        call.check_count(count)
        call.check_residual(residual)
        return residual.detach() if needs_residual else None


class _Slot:
    """What the autograd graph holds in place of a saved tensor."""

    __slots__ = ("__weakref__", "index", "is_constant", "run", "tensor", "version")

    def __init__(self, run: ReversibleRun, index: int, tensor: Tensor):
        self.run = run
        self.index = index
        self.is_constant = False
        """Whether the tensor is none of the function's own, so that it stays and is never rebuilt."""
        self.fill(tensor)

    def fill(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self.version = version_of(tensor)

    def check_version(self) -> None:
        """Raise if the tensor was written to since it was saved, as autograd would."""
        assert self.tensor is not None
        if version_of(self.tensor) != self.version:
            raise RuntimeError(_modified("a tensor that a residual function computed with", self.tensor, self.version))

    def unpack(self) -> Tensor:
        return self.run.unpack(self)


class _Origin:
    """Tells, once a function is done, whether a tensor that autograd saved is none of those that it computed.

    What the function computed for itself is gone by then, or has a later place in the graph. What is still there was
    there before: a tensor that is no parameter, buffer or argument.
    """

    __slots__ = ("_geometry", "_reference")

    def __init__(self, tensor: Tensor):
        base = tensor._base if tensor._is_view() else None
        self._reference = weakref.ref(tensor if base is None else base)
        self._geometry = None if base is None else (tensor.shape, tensor.stride(), tensor.storage_offset())

    def find(self, start: int) -> Tensor | None:
        """The tensor, if somebody keeps it who had it at place `start` of the graph; apart from that graph."""
        tensor = self._reference()
        if tensor is None or (tensor.grad_fn is not None and tensor.grad_fn._sequence_nr() >= start):
            return None
        if tensor.layout is not torch.strided:
            return None
        if tensor.untyped_storage().nbytes() < tensor.nbytes:
            return None  # FSDP has taken a parameter's memory away, and will bring it back for the next call.
        tensor = tensor.detach()
        return tensor if self._geometry is None else tensor.as_strided(*self._geometry)


class _Lasting(NamedTuple):
    """A saved tensor that outlives the half-block anyway: kept as it is, and guarded as autograd would guard it."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        if version_of(self.tensor) != self.version:
            raise RuntimeError(_modified("a parameter, buffer or argument of a residual function", *self))
        return self.tensor


def _modified(what: str, tensor: Tensor, version: int) -> str:
    return (
        f"one of the variables needed for gradient computation has been modified by an inplace operation: {what}, of "
        f"shape {tuple(tensor.shape)}, is at version {version_of(tensor)}; expected version {version} instead."
    )


def _unpack(packed: _Slot | _Lasting) -> Tensor:
    return packed.unpack()


def _identity(tensor: Tensor) -> Tensor:
    return tensor


class _Layout(NamedTuple):
    """What a recomputed tensor must share with the one that the forward pass saved."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "_Layout":
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def fits(self, tensor: Tensor) -> bool:
        return tensor.shape == self.shape and tensor.dtype == self.dtype and tensor.device == self.device

    def __str__(self) -> str:
        return f"{tuple(self.shape)} {self.dtype} on {self.device}"


class _Call:
    """One call of a residual function: how to repeat it, and the slots of what autograd saved."""

    def __init__(self, half_block: HalfBlock, source_requires_grad: bool, conditions: Conditions):
        self.half_block = half_block
        self.source_requires_grad = source_requires_grad
        self.conditions = conditions
        self.slots: list[weakref.ref[_Slot]] = []
        self.layouts: list[_Layout] = []
        self.residual: _Layout | None = None
        self.origins: list[_Origin] = []
        self.constants: dict[int, Tensor] = {}
        """By the number of the slot, tensors that were there before the call."""

    def has_slots(self) -> bool:
        """Whether a backward pass can still ask for any of the slots."""
        return any(slot() is not None for slot in self.slots)

    def empty_slots(self) -> None:
        """Forget the tensors of the slots that are still there."""
        for reference in self.slots:
            slot = reference()
            if slot is not None and not slot.is_constant:
                slot.tensor = None

    def keep_what_is_not_its_own(self, start: int, source: Tensor, residual: Tensor) -> None:
        """Let slots keep tensors that were there before the call, and watch them as parameters are watched."""
        if forward_ad._current_level >= 0:
            return  # Tangents come and go with their level.
        own = {storage_key(each) for each in (source, residual) if isinstance(each, Tensor)}
        for number, (reference, origin) in enumerate(zip(self.slots, self.origins, strict=True)):
            slot, tensor = reference(), origin.find(start)
            if slot is None or tensor is None or storage_key(tensor) in own:
                continue
            if not self.conditions.may_be_cast(tensor):  # Autocast keeps those for a while, and casts again.
                slot.tensor, slot.is_constant = tensor, True
                self.constants[number] = tensor
                self.conditions.watch(tensor, slot.version)
        self.origins.clear()

    def check(self, count: int, tensor: Tensor) -> None:
        """Raise unless `tensor` can be the one that the forward pass saved as number `count`."""
        if count >= len(self.slots):
            self.fail(f"saved more than the {len(self.slots)} tensors that the forward pass saved")
        if not self.layouts[count].fits(tensor):
            self.fail(f"saved {_Layout.of(tensor)} where the forward pass saved {self.layouts[count]}")
        constant = self.constants.get(count)
        if constant is not None and storage_key(tensor) != storage_key(constant) and _differ(tensor, constant):
            # A function may compute it anew and put it in the old one's place; then it is the same but for rounding.
            self.fail("used another tensor, which is none of its parameters, buffers and arguments")

    def check_count(self, count: int) -> None:
        """Raise unless the recomputation saved as many tensors as the forward pass."""
        if count != len(self.slots):
            self.fail(f"saved {count} tensors where the forward pass saved {len(self.slots)}")

    def check_residual(self, residual: object) -> None:
        """Raise unless the recomputation returned what the forward pass returned, but for the values."""
        layout = _Layout.of(residual) if isinstance(residual, Tensor) else type(residual).__name__
        if layout != self.residual:
            self.fail(f"returned {layout} where the forward pass returned {self.residual}")

    def fail(self, difference: str) -> NoReturn:
        raise ReconstructionError(
            f"`{self.half_block.name}` did something else when it ran again: it {difference}. A residual function must "
            "do the same both times (no counters, caches or conditions that change); otherwise keep its block's "
            "activations with the policy `Store()`."
        )


def _differ(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by more than rebuilding does."""
    tensor, other = tensor.detach().double(), other.detach().double()
    return bool((tensor - other).norm() > 1e-2 * other.norm())


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
        self._check_version(which)
        tensor = self._tensors[which]
        assert tensor is not None
        if tensor.stride() != self.layouts[which]:
            # Both at once: halves of one output share its memory, of which neither would let go alone.
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

    def take(self, which: int) -> Tensor:
        """`read` without keeping it, so that the caller is its only owner unless somebody else sees the memory."""
        tensor = self.read(which)
        self._tensors[which] = None
        return tensor

    def put(self, which: int, tensor: Tensor) -> None:
        self._tensors[which] = tensor
        self._versions[which] = version_of(tensor)
