"""Call blocks within a chain, for their hooks or for a `forward` of their own.

A chain runs residual functions, not blocks. But a block must be called if it has hooks, or if its `forward` was
replaced or overridden. The chain then calls the block. The block's `forward` learns from `call_within` that it is part
of a chain, and hands the streams back to the chain.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from revnet._types import Streams
from revnet.engine._tensors import storage_key
from revnet.engine._tracing import refuse

if TYPE_CHECKING:
    from revnet.engine._chain import BoundChain


class _BlockCalls(threading.local):
    """The call of a block by a chain that is running in this thread."""

    within: tuple[nn.Module, Callable[..., Streams]] | None = None
    """The block, and the function that its `forward` must call; None if no chain is calling a block."""


block_calls = _BlockCalls()


def run_through_blocks(
    chain: "BoundChain", streams: list[Tensor], advance: Callable[[int, list[Tensor]], None]
) -> None:
    """Run the half-blocks of a chain with `advance`, and call each block that must be called.

    Raises:
        NotImplementedError: `torch.compile` traces a chain with such blocks.
        RuntimeError: A hook, or the block's own `forward`, replaced an input or output, which cannot be undone.
    """
    for block, indices in chain.chain.groups():
        if block is None:
            for index in indices:
                advance(index, streams)
        elif torch.compiler.is_dynamo_compiling():
            refuse(
                f"the block of `{chain.half_blocks[indices[0]].name}` has hooks or a `forward` of its own, which a "
                "compiled reversible sequence does not call; register hooks on its `f` and `g` or on the sequence "
                "instead."
            )
        else:
            _run_block(chain, block, indices, streams, advance)


def _run_block(
    chain: "BoundChain",
    block: nn.Module,
    indices: range,
    streams: list[Tensor],
    advance: Callable[[int, list[Tensor]], None],
) -> None:
    name = chain.half_blocks[indices[0]].name
    kwargs = {**chain.kwargs, **{f"{role}_kwargs": own for role, own in chain.own_kwargs.items()}}
    has_run = False

    def run(x: Any, args_within: tuple[Any, ...], kwargs_within: dict[str, Any]) -> Streams:
        nonlocal has_run
        # Checked before anything runs: the streams that a hook has replaced cannot be rebuilt.
        _check_not_cast("input", block, name, streams, x)
        _check_same("input", name, (tuple(streams), chain.args, kwargs), (x, args_within, kwargs_within))
        has_run = True
        # Hooks pass on other tensors with the same memory; gradients reach a backward hook only through the nodes of
        # these.
        streams[:] = x
        for index in indices:
            advance(index, streams)
        return tuple(streams)

    # Restored afterwards: the `forward` of another block may run this chain before it asks for its own call.
    before = block_calls.within
    block_calls.within = (block, run)
    try:
        y = block(tuple(streams), *chain.args, **kwargs)
    finally:
        block_calls.within = before
    if not has_run:
        raise RuntimeError(
            f"the `forward` of the block of `{name}` ({type(block).__name__}) did not call the one that it replaces, "
            "so the sequence cannot run the block's residual functions reversibly; call `super().forward(x, *args, "
            "**kwargs)` in it, or put the module before or after the sequence."
        )
    _check_not_cast("output", block, name, streams, y)
    _check_same("output", name, tuple(streams), y)
    streams[:] = y


def call_within(block: nn.Module) -> Callable[..., Streams] | None:
    """Return the function that `block.forward` must call with its arguments if a chain called it; otherwise None."""
    within = None if torch.compiler.is_dynamo_compiling() else block_calls.within
    if within is None or within[0] is not block:
        return None
    # Only once: a block that calls this `forward` twice must not advance the chain twice.
    block_calls.within = None
    return within[1]


def _check_not_cast(what: str, block: nn.Module, name: str, streams: list[Tensor], passed: Any) -> None:
    """Raise if FSDP2 has cast the streams, which its mixed precision does to all inputs or outputs of a module."""
    if not hasattr(block, "set_requires_gradient_sync"):
        return
    dtype = streams[0].dtype
    casts = [stream for stream in tree_leaves(passed) if isinstance(stream, Tensor) and stream.dtype != dtype]
    if casts:
        raise RuntimeError(
            f"`fully_shard` with mixed precision replaced its {what}: it cast the streams of the block of `{name}` "
            f"from {dtype} to {casts[0].dtype}, which reversal cannot undo; call "
            "`revnet.distributed.shard_blocks(model, mp_policy=...)`, which keeps streams in float32, or shard the `f` "
            "and `g` of the block instead."
        )


def _check_same(what: str, name: str, expected: Any, actual: Any) -> None:
    """Raise unless both hold the same values; tensors may differ, but must share the same memory."""
    # By memory: a module's full backward hooks wrap its inputs and outputs in new tensors.
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
            f"a hook or an overridden `forward` of the block of `{name}` replaced its {what}, which reversal cannot "
            "undo; change the inputs or outputs of its `f` and `g` instead, or make the change between two sequences."
        )
