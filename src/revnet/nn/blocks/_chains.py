"""The chains of a sequence: how they are made of its blocks, and for how long they are kept."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from revnet._torch_internals import has_global_module_hook
from revnet.engine import Chain, HalfBlock
from revnet.nn.blocks._abstract_block import READS, AbstractReversibleBlock, schedule_of
from revnet.nn.blocks._reversible_module import Origin, look
from revnet.nn.blocks._run import Segment
from revnet.nn.blocks._schedule import Kept, Schedule
from revnet.nn.policies._policy import AbstractPolicy

if TYPE_CHECKING:
    from revnet.nn.blocks._reversible_sequential import ReversibleSequential

_Key = tuple[tuple[AbstractPolicy, ...], list[list[HalfBlock]], list[AbstractReversibleBlock | None]]
"""Policies, half-blocks and, where it must be called, the block; an entry for each block."""


class Known(NamedTuple):
    """What a sequence ran last."""

    key: _Key
    schedule: Schedule
    origin: Origin | None
    """What the schedule was made of; None where a look at that is not enough, so that the key is made in each step."""


class Chains(Kept):
    """The chains of a sequence, kept for as long as its blocks, their functions and their policies are the same."""

    def __init__(self) -> None:
        self.known: Known | None = None
        """What is kept; one object, so that other threads find parts that fit together."""

    def of(
        self,
        sequence: "ReversibleSequential",
        blocks: list[AbstractReversibleBlock],
        kind: "type[ReversibleSequential]",
    ) -> Schedule:
        """Return the chains of a sequence.

        Args:
            sequence: The sequence.
            blocks: Its blocks.
            kind: The class of sequences itself, of which `sequence` may be a subclass with other `policies`.
        """
        half_blocks = [block.half_blocks(f"blocks.{index}.") for index, block in enumerate(blocks)]
        called = [block if must_be_called(block) else None for block in blocks]
        key = (sequence.policies, half_blocks, called)
        first = blocks[0] if blocks else None
        if torch.compiler.is_dynamo_compiling():  # A trace makes its own; it cannot compare with what eager code left.
            return schedule_of(_segments_of(*key), first)
        known = self.known
        segments = known.schedule.segments if known is not None and known.key == key else _segments_of(*key)
        schedule = schedule_of(segments, first)
        self.known = Known(key, schedule, _origin_of(sequence, blocks, key, kind))
        return schedule


def must_be_called(block: AbstractReversibleBlock) -> bool:
    """Return whether a call of the block does more than run its residual functions.

    It has hooks, or a `forward` of its own: a subclass's, or one that a tool has set on the instance.
    """
    return bool(
        block._forward_hooks
        or block._forward_pre_hooks
        or block._backward_hooks
        or block._backward_pre_hooks
        or type(block).forward is not AbstractReversibleBlock.forward
        or "forward" in block.__dict__
        or (not torch.compiler.is_dynamo_compiling() and has_global_module_hook())
    )


def _origin_of(
    sequence: "ReversibleSequential",
    blocks: Sequence[AbstractReversibleBlock],
    key: _Key,
    kind: "type[ReversibleSequential]",
) -> Origin | None:
    """Return what the chains were made of; None if user code has a part in it, and where blocks must be called."""
    policies, half_blocks, called = key
    if (
        sequence.blocks is not sequence._modules.get("blocks")
        or type(sequence).policies is not kind.policies
        or any(block is not None for block in called)
    ):
        return None
    reads = []
    for block, of_block in zip(blocks, half_blocks, strict=True):
        known = None if "half_blocks" in block.__dict__ else READS.get(type(block).half_blocks)
        if known is None:
            return None
        _, children, list_name = known
        modules = [block._modules.get(child) for child in children]
        if list_name is not None:
            functions = block._modules[list_name]
            if type(functions) is not nn.ModuleList:
                return None
            modules += functions
        # A property may have hidden a child.
        if any(module is not half_block.function for module, half_block in zip(modules, of_block, strict=True)):
            return None
        reads.append(known)
    return Origin(policies, reads, look(blocks, reads))


def _segments_of(
    policies: tuple[AbstractPolicy, ...],
    half_blocks: list[list[HalfBlock]],
    called: list[AbstractReversibleBlock | None],
) -> list[Segment]:
    # Plain loops: `torch.compile` traces this.
    runs: list[tuple[AbstractPolicy, list[HalfBlock], list[nn.Module | None]]] = []
    for policy, of_block, block in zip(policies, half_blocks, called, strict=True):
        for half_block in of_block:
            _check_couplings(half_blocks[0][0], half_block)
        if not runs or runs[-1][0] != policy:
            runs.append((policy, [], []))
        runs[-1][1].extend(of_block)
        runs[-1][2].extend([block] * len(of_block))
    return [(policy, Chain(of_run, blocks)) for policy, of_run, blocks in runs]


def _check_couplings(first: HalfBlock, other: HalfBlock) -> None:
    """Raise for exact and other couplings in one sequence."""
    if (other.coupling.is_exact or first.coupling.is_exact) and other.coupling != first.coupling:
        raise ValueError(
            f"`{other.name}` has the coupling {other.coupling}, and `{first.name}` {first.coupling}; where one is "
            "exact, streams lie on its grid, so that all of a sequence must have the same: see `set_coupling`."
        )
