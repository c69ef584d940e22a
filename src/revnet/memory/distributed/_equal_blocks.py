"""Find runs of equal blocks, and copy a model with fewer of them."""

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from revnet.nn import ReversibleSequential

FEWEST = 12
"""Smallest length of a run for which leaving blocks out saves time."""
_OF_EVERY_MODULE = set(nn.Module().__dict__) - {"training"}
_PLAIN = (bool, int, str, bytes, type(None), torch.dtype, torch.device)


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

    Blocks are equal if their modules have the same classes and attributes, their tensors the same shapes, and if they
    have the same policy. Rates may differ, such as dropout. A block that shares a tensor with another module is not
    equal to any.
    """
    runs = []
    for name, sequence in model.named_modules():
        # With a tolerance, values decide which blocks hold a keyframe.
        if type(sequence) is ReversibleSequential and sequence.tolerance is None:
            for _, group in groupby(enumerate(kinds_of_blocks(model, sequence)), key=itemgetter(1)):
                indices = [index for index, _ in group]
                if len(indices) >= FEWEST:
                    runs.append(EqualBlocks(name, indices[0], indices[-1] + 1))
    return runs


def kinds_of_blocks(model: nn.Module, sequence: ReversibleSequential) -> list[int]:
    """Return a number for each block of a sequence in a model, which is the same for equal blocks."""
    num_uses = Counter(id(tensor) for module in model.modules() for tensor in _own_tensors(module))
    known: list[Any] = []
    kinds = []
    for block, policy in zip(sequence, sequence.policies, strict=True):
        structure = None if _shares_tensors(block, num_uses) else (_structure_of(block), policy)
        # Usually it is like the one before.
        kind = next((index for index in range(len(known) - 1, -1, -1) if structure and known[index] == structure), -1)
        if kind < 0:
            kind = len(known)
            known.append(structure)
        kinds.append(kind)
    return kinds


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
        for tensor in _own_tensors(module):
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


def _own_tensors(module: nn.Module) -> Iterable[Tensor]:
    tensors = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in tensors if tensor is not None]


def _shares_tensors(block: nn.Module, num_uses: Counter[int]) -> bool:
    return any(num_uses[id(tensor)] > 1 for module in block.modules() for tensor in _own_tensors(module))


def _structure_of(block: nn.Module) -> tuple[Any, ...]:
    """Return a value that is equal for two blocks that run the same operations on the same shapes."""
    return tuple(
        (
            name,
            type(module),
            [(key, _simplified(value)) for key, value in module.__dict__.items() if key not in _OF_EVERY_MODULE],
            [(key, _simplified(value)) for key, value in (*module._parameters.items(), *module._buffers.items())],
            bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks),
        )
        for name, module in block.named_modules()
    )


def _simplified(value: Any) -> Any:
    """Return a value that can be compared, without what does not change the bytes."""
    if isinstance(value, float):
        return value == 0
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.requires_grad
    if isinstance(value, list | tuple):
        return [_simplified(item) for item in value]
    if isinstance(value, dict):
        return [(key, _simplified(item)) for key, item in value.items()]
    if isinstance(value, _PLAIN) or callable(value) or dataclasses.is_dataclass(value):
        return value
    return type(value)
