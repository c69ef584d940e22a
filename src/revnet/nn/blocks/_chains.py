"""The chains of a sequence: how they are built from its blocks, and when they are built again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from revnet._torch_internals import has_global_module_hook
from revnet._torch_release import allow_default_coupling
from revnet.coupling import Additive
from revnet.engine import Chain, HalfBlock
from revnet.engine._moves import Moves
from revnet.nn.blocks._abstract_block import READS, AbstractReversibleBlock, check_couplings, schedule_of
from revnet.nn.blocks._blocks_in_runs import BlockInRun
from revnet.nn.blocks._reversible_module import Origin, read_blocks
from revnet.nn.blocks._run import Segment
from revnet.nn.blocks._schedule import ModuleCache, Schedule
from revnet.nn.policies._policy import AbstractPolicy, Reverse

if TYPE_CHECKING:
    from revnet.nn.blocks._reversible_sequential import ReversibleSequential

_Key = tuple[tuple[AbstractPolicy, ...], list[list[HalfBlock]], list[AbstractReversibleBlock | None]]
"""Policies, half-blocks, and the block itself if it must be called: one entry for each block."""


@dataclass(frozen=True)
class Known:
    """The schedule that a sequence ran last."""

    key: _Key
    schedule: Schedule
    origin: Origin | None
    """The parts of the schedule. None if comparing them is not enough, so that each step builds the key."""


class Chains(ModuleCache):
    """The chains of a sequence. They are built again when its blocks, their functions or their policies change."""

    def __init__(self) -> None:
        self.known: Known | None = None
        """The cached schedule. It is one object, so that other threads see parts that belong together."""

    def of(
        self,
        sequence: "ReversibleSequential",
        blocks: list[AbstractReversibleBlock],
        kind: "type[ReversibleSequential]",
    ) -> Schedule:
        """Return the schedule of a sequence.

        Args:
            sequence: The sequence.
            blocks: Its blocks.
            kind: The class `ReversibleSequential`. `sequence` may be a subclass that overrides `policies`.
        """
        if torch.compiler.is_dynamo_compiling():
            allow_default_coupling(Additive)
        half_blocks = [block.half_blocks(_prefix_of(sequence, index)) for index, block in enumerate(blocks)]
        called = [block if must_be_called(block) else None for block in blocks]
        key = (sequence.policies, half_blocks, called)
        first = blocks[0] if blocks else None
        if torch.compiler.is_dynamo_compiling():  # A trace cannot compare with what eager code cached.
            return schedule_of(_segments_of(*key), first)
        known = self.known
        segments = known.schedule.segments if known is not None and known.key == key else _segments_of(*key)
        schedule = schedule_of(segments, first)
        self.known = Known(key, schedule, _origin_of(sequence, blocks, key, kind))
        return schedule


def list_blocks(sequence: "ReversibleSequential", blocks: Sequence[AbstractReversibleBlock]) -> list[BlockInRun]:
    """Return the blocks of a sequence, whose half-blocks have the names that they have in its chains."""
    return [
        BlockInRun(
            name=f"blocks.{index}",
            module=block,
            policy=policy,
            half_blocks=block.half_blocks(_prefix_of(sequence, index)),
            row=sequence,
            index=index,
            num_streams=block.num_streams,
        )
        for index, (block, policy) in enumerate(zip(blocks, sequence.policies, strict=True))
    ]


def _prefix_of(sequence: "ReversibleSequential", index: int) -> str:
    """Return the name of a block in errors, with a dot at its end."""
    return f"blocks.{sequence.first_block + index}."


def must_be_called(block: AbstractReversibleBlock) -> bool:
    """Return whether a call of the block does more than run its residual functions."""
    is_dynamo_compiling = torch.compiler.is_dynamo_compiling()
    return has_own_call(block, AbstractReversibleBlock) or (not is_dynamo_compiling and has_global_module_hook())


def has_own_call(module: nn.Module, base: type[nn.Module]) -> bool:
    """Return whether a call of the module does more than the `forward` of its base class.

    This is so if it has hooks, or a `forward` that a subclass overrides or that a tool has set on the instance.
    """
    return bool(
        # Without `hooks_of`, which `torch.compile` cannot trace.
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or type(module).forward is not base.forward
        or "forward" in module.__dict__
    )


def _origin_of(
    sequence: "ReversibleSequential",
    blocks: Sequence[AbstractReversibleBlock],
    key: _Key,
    kind: "type[ReversibleSequential]",
) -> Origin | None:
    """Return the parts of the chains, or None if they depend on user code or if blocks must be called."""
    policies, half_blocks, called = key
    if (
        sequence.blocks is not sequence._modules.get("blocks")
        or type(sequence).policies is not kind.policies
        or any(block is not None for block in called)
    ):
        return None
    reads = []
    for block, block_half_blocks in zip(blocks, half_blocks, strict=True):
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
        # A property may hide a child.
        if any(
            module is not half_block.function for module, half_block in zip(modules, block_half_blocks, strict=True)
        ):
            return None
        reads.append(known)
    return Origin(policies, reads, read_blocks(blocks, reads))


def _segments_of(
    policies: tuple[AbstractPolicy, ...],
    half_blocks: list[list[HalfBlock]],
    called: list[AbstractReversibleBlock | None],
) -> list[Segment]:
    # Plain loops: `torch.compile` traces this.
    runs: list[tuple[AbstractPolicy, list[HalfBlock], list[nn.Module | None], list[Moves | None]]] = []
    for policy, block_half_blocks, block in zip(policies, half_blocks, called, strict=True):
        for half_block in block_half_blocks:
            check_couplings(half_blocks[0][0], half_block)
        # What they keep differs within one chain; with two chains, both would hold their final streams.
        are_reversed = len(runs) > 0 and type(policy) is Reverse and type(runs[-1][0]) is Reverse
        if not runs or (runs[-1][0] != policy and not are_reversed):
            runs.append((policy, [], [], []))
        runs[-1][1].extend(block_half_blocks)
        runs[-1][2].extend([block] * len(block_half_blocks))
        runs[-1][3].extend(
            policy.moves_for(block_half_blocks) if type(policy) is Reverse else [None] * len(block_half_blocks)
        )
    return [(policy, Chain(run_half_blocks, blocks, moves)) for policy, run_half_blocks, blocks, moves in runs]
