"""Find runs of equal blocks, and copy a model with fewer of them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from revnet.memory.repeats._block_kinds import kinds_of_blocks, own_tensors
from revnet.nn import ReversibleSequential

FEWEST = 12
"""Smallest length of a run for which leaving blocks out saves time."""


@dataclass(frozen=True)
class EqualBlocks:
    """A run of consecutive blocks of a sequence that need the same memory."""

    sequence: str
    """Name of the `ReversibleSequential` in the model."""
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def find_equal_blocks(model: nn.Module) -> list[EqualBlocks]:
    """Return the long runs of equal blocks.

    Blocks are equal if `kinds_of_blocks` says so, and if they have the same policy.
    """
    runs = []
    for name, sequence in model.named_modules():
        # With a tolerance, values decide which blocks hold a keyframe.
        if type(sequence) is ReversibleSequential and sequence.tolerance is None:
            kinds = zip(kinds_of_blocks(model, sequence), sequence.policies, strict=True)
            for _, group in groupby(enumerate(kinds), key=itemgetter(1)):
                indices = [index for index, _ in group]
                if len(indices) >= FEWEST:
                    runs.append(EqualBlocks(name, indices[0], indices[-1] + 1))
    return runs


def copy_to_meta(model: nn.Module, runs: Sequence[EqualBlocks] = (), lengths: Sequence[int] = ()) -> nn.Module:
    """Return a copy of a model on the meta device, in which the runs have the given lengths.

    Its parameters are contiguous, because `fully_shard` takes no others.
    """
    left_out: dict[str, set[int]] = {}
    for run, length in zip(runs, lengths, strict=True):
        left_out.setdefault(run.sequence, set()).update(range(run.start + length, run.stop))
    memo: dict[int, Any] = {}
    for name, indices in left_out.items():
        # Copied as None, which takes no time.
        memo |= {id(block): None for index, block in enumerate(_sequence(model, name)) if index in indices}
    for module in model.modules():
        for tensor in own_tensors(module):
            data = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(data, tensor.requires_grad) if is_parameter else data
    copied = copy.deepcopy(model, memo)
    for name, indices in left_out.items():
        original, sequence = _sequence(model, name), _sequence(copied, name)
        kept = [index for index in range(len(original)) if index not in indices]
        sequence.blocks = nn.ModuleList([sequence[index] for index in kept])
        sequence.set_policies([original.policies[index] for index in kept])
    return copied


def _sequence(model: nn.Module, name: str) -> ReversibleSequential:
    sequence = model.get_submodule(name)
    assert isinstance(sequence, ReversibleSequential)
    return sequence
