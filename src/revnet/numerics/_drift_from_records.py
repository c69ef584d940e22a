"""Turn the records of a `DriftMeter` into a `Drift`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import nn

from revnet.engine import HalfBlock
from revnet.engine._drift import DriftRecord
from revnet.nn import AbstractPolicy, AbstractReversibleBlock, Reverse, ReversibleSequential
from revnet.numerics._block_drift import BlockDrift
from revnet.numerics._drift import Drift


def drift_of(model: nn.Module, records: Sequence[DriftRecord]) -> Drift:
    """Return the drift of a step of any training loop, from the records of a `DriftMeter`.

    Recording a step costs little: about a hundred elements of the input of each function are kept and compared.

    Args:
        model: The model, with reversible blocks.
        records: `meter.records` after the backward pass. On a GPU, the call waits for that pass to end.

    Returns:
        Errors and amplification of all blocks. Only `measure_drift` compares gradients.
    """
    sequences = [(name, module) for name, module in model.named_modules() if isinstance(module, ReversibleSequential)]
    keyframes = [f"{name}.{keyframe}".lstrip(".") for name, sequence in sequences for keyframe in sequence.keyframes]
    tolerance = min((sequence.tolerance for _, sequence in sequences if sequence.tolerance is not None), default=None)
    return replace(_drift_of(locate_blocks(model), records), keyframes=tuple(keyframes), tolerance=tolerance)


@dataclass(frozen=True, eq=False)
class LocatedBlock:
    """Reversible block with its position in the model."""

    name: str
    module: AbstractReversibleBlock
    policy: AbstractPolicy
    chain: Sequence[HalfBlock]
    """Half-blocks of the whole sequence."""
    start: int
    """Index of its first half-block in `chain`."""
    is_in_sequence: bool


def locate_blocks(model: nn.Module) -> list[LocatedBlock]:
    """Return all reversible blocks, in the order of `named_modules`."""
    located: list[LocatedBlock] = []
    in_sequence: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, ReversibleSequential):
            chain: list[HalfBlock] = []
            for index, (block, policy) in enumerate(zip(module, module.policies, strict=True)):
                assert isinstance(block, AbstractReversibleBlock)
                prefix = f"blocks.{index}"
                located.append(LocatedBlock(f"{name}.{prefix}".lstrip("."), block, policy, chain, len(chain), True))
                chain += block.half_blocks(f"{prefix}.")
                in_sequence.add(id(block))
        elif isinstance(module, AbstractReversibleBlock) and id(module) not in in_sequence:
            located.append(LocatedBlock(name, module, Reverse(), module.half_blocks(), 0, False))
    return located


_FARTHEST = 8
"""Largest number of half-blocks to search in either direction for one that reads a stream."""


@dataclass(frozen=True, eq=False)
class _Reading:
    """Error of a stream that a residual function read again."""

    error: float
    distance: int


def _drift_of(blocks: Sequence[LocatedBlock], records: Sequence[DriftRecord]) -> Drift:
    """Compute the error of each block's input, and the amplification of each block."""
    readings = _readings(records)
    given = []
    for block in blocks:
        streams = (
            _reading_of(stream, block.chain, block.start, readings) for stream in range(block.module.num_streams)
        )
        given.append(_joined([reading for reading in streams if reading is not None]))
    drifts = []
    for index, (block, reading) in enumerate(zip(blocks, given, strict=True)):
        is_last = index + 1 == len(blocks) or blocks[index + 1].chain is not block.chain
        following = None if is_last else given[index + 1]
        error, amplification = None if reading is None else reading.error, None
        # Only an input that is farther from a kept stream than its successor was rebuilt from it. Otherwise a
        # tolerance replaced it by the true stream.
        if reading is not None and following is not None and reading.distance > following.distance:
            amplification = reading.error / following.error if reading.error and following.error else None
        is_exact = all(half_block.coupling.is_exact for half_block in block.module.half_blocks())
        drifts.append(BlockDrift(block.name, block.policy, is_exact, error, amplification))
    return Drift(tuple(drifts), records[0].dtype if records else None)


def _reading_of(
    stream: int, chain: Sequence[HalfBlock], start: int, readings: Mapping[tuple[int, str], _Reading]
) -> _Reading | None:
    """Return the nearest reading of `stream` that sees the same value as half-block `start`, in either direction."""
    after = takewhile(lambda half_block: half_block.target != stream, chain[start : start + _FARTHEST])
    before = takewhile(
        lambda half_block: half_block.target != stream, reversed(chain[max(0, start - _FARTHEST) : start])
    )
    for half_block in (*after, *before):
        reading = readings.get((id(half_block.function), half_block.name))
        if reading is not None:
            return reading
    return None


def _readings(records: Iterable[DriftRecord]) -> dict[tuple[int, str], _Reading]:
    """Return readings by function and name; of a function that ran several times, the worst."""
    readings: dict[tuple[int, str], _Reading] = {}
    for record in records:
        key, error = (id(record.function), record.name), float(record.error)
        if key not in readings or not error <= readings[key].error:
            readings[key] = _Reading(error, record.distance)
    return readings


def _joined(readings: Sequence[_Reading]) -> _Reading | None:
    """Combine the readings of all streams."""
    if not readings:
        return None
    error = math.sqrt(sum(reading.error**2 for reading in readings) / len(readings))
    return _Reading(error, min(reading.distance for reading in readings))
