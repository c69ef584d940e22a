"""Turn the records of a `DriftMeter` into a `Drift`."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from torch import nn

from revnet.engine import HalfBlock
from revnet.engine._drift import DriftRecord
from revnet.nn import ReversibleSequential
from revnet.nn.blocks._blocks_in_runs import BlockInRun, blocks_in_runs
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
    return replace(_drift_of(blocks_in_runs(model), records), keyframes=tuple(keyframes), tolerance=tolerance)


_FARTHEST = 8
"""Largest number of half-blocks to search in either direction for one that reads a stream."""


@dataclass(frozen=True, eq=False)
class _Reading:
    """Error of a stream that a residual function read again."""

    error: float
    distance: int
    """Number of half-blocks between the function and the nearest stream that was kept."""


@dataclass(frozen=True, eq=False)
class _RebuiltInput:
    """Error of the input of a block, the rebuilt streams of it together."""

    error: float
    origin: int
    """Number of half-blocks of the row before the kept streams from which the input was rebuilt."""


def _drift_of(blocks: Sequence[BlockInRun], records: Sequence[DriftRecord]) -> Drift:
    """Compute the error of each block's input, and the amplification of each block."""
    readings = _readings(records)
    rows: dict[int, list[HalfBlock]] = {}
    starts = []
    for block in blocks:
        row = rows.setdefault(id(block.row), [])
        starts.append(len(row))
        row += block.half_blocks
    given = [
        _input_of(block, rows[id(block.row)], start, readings) for block, start in zip(blocks, starts, strict=True)
    ]
    drifts = []
    for index, (block, rebuilt) in enumerate(zip(blocks, given, strict=True)):
        is_last = index + 1 == len(blocks) or blocks[index + 1].row is not block.row
        following = None if is_last else given[index + 1]
        amplification = None
        # Only an input that was rebuilt from the same kept streams as its successor was rebuilt from it. Otherwise a
        # tolerance replaced it by the true streams.
        if rebuilt is not None and following is not None and rebuilt.origin == following.origin:
            amplification = rebuilt.error / following.error if rebuilt.error and following.error else None
        drifts.append(
            BlockDrift(
                name=block.name,
                policy=block.policy,
                is_exact=all(half_block.coupling.is_exact for half_block in block.half_blocks),
                error=None if rebuilt is None else rebuilt.error,
                amplification=amplification,
                remedies=block.remedies,
            )
        )
    return Drift(tuple(drifts), records[0].dtype if records else None)


def _input_of(
    block: BlockInRun, row: Sequence[HalfBlock], start: int, readings: Mapping[tuple[int, str], _Reading]
) -> _RebuiltInput | None:
    """Return the error of the input of a block whose half-blocks begin at `start` in its row; None if it was kept."""
    streams = [_stream_of(stream, row, start, readings) for stream in range(block.num_streams)]
    rebuilt = [stream for stream in streams if stream is not None]
    if not rebuilt:
        return None
    error = math.sqrt(sum(stream.error**2 for stream in rebuilt) / len(rebuilt))
    return _RebuiltInput(error, min(stream.origin for stream in rebuilt))


def _stream_of(
    stream: int, row: Sequence[HalfBlock], start: int, readings: Mapping[tuple[int, str], _Reading]
) -> _RebuiltInput | None:
    """Return the nearest reading of `stream` that sees the same value as half-block `start`, in either direction."""
    after = range(start, min(start + _FARTHEST, len(row)))
    before = range(start - 1, max(0, start - _FARTHEST) - 1, -1)
    for indices in (after, before):
        for index in takewhile(lambda index: row[index].target != stream, indices):
            reading = readings.get((id(row[index].function), row[index].name))
            if reading is not None:
                return _RebuiltInput(reading.error, index + 1 + reading.distance)
    return None


def _readings(records: Iterable[DriftRecord]) -> dict[tuple[int, str], _Reading]:
    """Return readings by function and name; of a function that ran several times, the worst."""
    readings: dict[tuple[int, str], _Reading] = {}
    for record in records:
        key, error = (id(record.function), record.name), float(record.error)
        if key not in readings or not error <= readings[key].error:
            readings[key] = _Reading(error, record.distance)
    return readings
