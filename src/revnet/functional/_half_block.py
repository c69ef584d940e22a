"""One half of a reversible block: a residual function, and the stream that it updates."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from revnet._types import Streams
from revnet.coupling import AbstractCoupling, Additive
from revnet.errors import ReconstructionError
from revnet.functional._storage import has_values, largest_element, storage_key, version_of

_ADDITIVE = Additive()


class HalfBlock(NamedTuple):
    """One residual function and the stream that it updates from another one.

    A reversible block is two of them: `y1 = x1 + f(x2)` updates stream 0, then `y2 = x2 + g(y1)` updates stream 1.
    """

    function: nn.Module
    updates: int
    """The stream that it updates, counted from 0."""
    name: str = "f"
    """The function's place in the model, for errors: "blocks.3.f"."""
    owner: nn.Module | None = None
    """The block that must be called for it, since it has hooks; one call for consecutive half-blocks of one owner."""
    coupling: AbstractCoupling = _ADDITIVE
    """How the residual joins the stream."""
    reads: torch.dtype | None = None
    """What the function is given, if not the stream's own type."""
    log_dets: list[Tensor] | None = None
    """Where its log-determinant, (B,), is added up if somebody asks for it: a list of one sum, empty at zero."""
    source: int | None = None
    """The stream that it reads; None for the other one of two."""

    @property
    def reads_stream(self) -> int:
        """The stream that it reads, counted from 0."""
        return 1 - self.updates if self.source is None else self.source


Advance = Callable[[HalfBlock, list[Tensor]], None]
"""Runs one half-block on a list of streams, in which it puts the new one."""


def run_chain(
    half_blocks: Sequence[HalfBlock],
    streams: list[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    advance: Advance,
) -> None:
    """Run half-blocks in order on `streams`, and the hooks of the blocks that they belong to.

    Raises:
        RuntimeError: A hook of a block replaced one of its inputs or outputs, which reversal could not undo.
    """
    for owner, group in _by_owner(half_blocks):
        if owner is None:
            for half_block in group:
                advance(half_block, streams)
        elif torch.compiler.is_dynamo_compiling():
            raise hooks_are_not_compiled(group[0])
        else:
            _run_through_hooks(owner, group, streams, args, kwargs, advance)


def hooks_are_not_compiled(half_block: HalfBlock) -> NotImplementedError:
    """The error for a block with hooks under `torch.compile`."""
    return NotImplementedError(
        f"the block of `{half_block.name}` has hooks, which a compiled reversible sequence does not call; register "
        "them on its `f` and `g`, or on the sequence."
    )


def _by_owner(half_blocks: Sequence[HalfBlock]) -> Iterator[tuple[nn.Module | None, list[HalfBlock]]]:
    group: list[HalfBlock] = []
    for half_block in half_blocks:
        if group and half_block.owner is not group[0].owner:
            yield group[0].owner, group
            group = []
        group.append(half_block)
    if group:
        yield group[0].owner, group


_calls = threading.local()


def _run_through_hooks(
    owner: nn.Module,
    group: list[HalfBlock],
    streams: list[Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    advance: Advance,
) -> None:
    """Call `owner` on the streams; its `forward` finds by `call_within` that it is part of a chain, and hands over."""

    def run(x: Any, args_within: tuple[Any, ...], kwargs_within: dict[str, Any]) -> Streams:
        _check_same("input", group[0].name, (tuple(streams), args, kwargs), (x, args_within, kwargs_within))
        streams[:] = x
        for half_block in group:
            advance(half_block, streams)
        return tuple(streams)

    before = getattr(_calls, "within", None)
    _calls.within = (owner, run)
    try:
        y = owner(tuple(streams), *args, **kwargs)
    finally:
        _calls.within = before
    _check_same("output", group[0].name, tuple(streams), y)
    streams[:] = y


def call_within(owner: nn.Module) -> Callable[..., Streams] | None:
    """What `owner.forward` must call with all its arguments, if it is called for its hooks as part of a chain."""
    within = None if torch.compiler.is_dynamo_compiling() else getattr(_calls, "within", None)
    if within is None or within[0] is not owner:
        return None
    _calls.within = None
    run: Callable[..., Streams] = within[1]
    return run


def _check_same(what: str, name: str, expected: Any, actual: Any) -> None:
    """Raise unless both hold the same values: tensors may be others, but must see the same memory."""
    leaves, structure = tree_flatten(expected)
    actual_leaves, actual_structure = tree_flatten(actual)
    same = structure == actual_structure and all(
        (storage_key(a), a.storage_offset(), a.shape, a.stride())
        == (storage_key(b), b.storage_offset(), b.shape, b.stride())
        if isinstance(a, Tensor) and isinstance(b, Tensor)
        else a is b
        for a, b in zip(leaves, actual_leaves, strict=True)
    )
    if not same:
        raise RuntimeError(
            f"a hook of the block of `{name}` replaced its {what}, which reversal could not undo; change what its `f` "
            "and `g` read or return instead, or put the change between two sequences."
        )


def residual_of(half_block: HalfBlock, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Call a residual function, and refuse one that writes over its input: the input could not be rebuilt."""
    if half_block.reads is not None:
        source = source.to(half_block.reads)
    if torch.compiler.is_dynamo_compiling():  # Traced code has no versions; eager code and `compiled` have.
        return half_block.function(source, *args, **kwargs)
    version = version_of(source)
    residual = half_block.function(source, *args, **kwargs)
    if version_of(source) != version:
        raise RuntimeError(
            f"`{half_block.name}` modified its input in place, which a reversible block cannot undo; use the "
            "out-of-place form of its first operation (`inplace=False`), or `clone` the input."
        )
    return residual


def join(half_block: HalfBlock, x: Tensor, residual: Tensor) -> Tensor:
    """The stream with a residual; and the log-determinant of that, for those who ask for it."""
    coupling = half_block.coupling
    y = coupling.forward(x, residual, half_block.name)
    if half_block.log_dets is not None and not coupling.is_additive:
        log_det = coupling.log_det(x, residual)
        if log_det is not None:
            # Their sum alone, so that nothing grows with depth.
            half_block.log_dets[:] = [sum(half_block.log_dets, start=log_det)]
    return y


def without_receiver(half_block: HalfBlock) -> HalfBlock:
    """The same half-block, with its log-determinant computed and dropped, if at all."""
    return half_block if half_block.log_dets is None else half_block._replace(log_dets=[])


def check_magnitude(half_block: HalfBlock, y: Tensor) -> None:
    """`check_range` of a stream that the half-block has just updated."""
    if half_block.coupling.is_exact and has_values(y):
        check_range(half_block, float(largest_element(y)), y.dtype)


def check_range(half_block: HalfBlock, magnitude: float, dtype: torch.dtype) -> None:
    """Raise if a stream left the range in which the half-block can be undone exactly.

    Raises:
        ReconstructionError: It did. NaN and inf are none of it: those are the model's own.
    """
    limit = half_block.coupling.limit(dtype)
    if limit is not None and math.isfinite(magnitude) and magnitude >= limit:
        raise ReconstructionError(
            f"a stream reached {magnitude:,.5g} at `{half_block.name}`, beyond the {limit:,.5g} up to which "
            f"{half_block.coupling} is exact in {dtype}; {half_block.coupling.out_of_range_hint(magnitude, dtype)}, or "
            "normalise what the residual functions return."
        )
