"""A drift as text: a table of the blocks, the verdict, what to do."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from revnet._text_table import aligned

if TYPE_CHECKING:
    from revnet.numerics._drift import BlockDrift, Drift, GradientDrift

_MOST_ROWS = 40
"""With more blocks, runs of them are told by one."""
_MOST_NAMES = 8
_WIDTH = 120


def drift_lines(drift: Drift) -> list[str]:
    """All of it."""
    has_gradients = drift.gradient is not None
    head = ["block", "policy", "error", "amplification"]
    rows = [head + (["gradient error", "angle"] if has_gradients else [])]
    blocks = _thinned(drift.blocks)
    rows += [_row(block, has_gradients) for block in blocks]
    if has_gradients:
        rows.append(["(the model)", "", "", "", *_gradient_cells(drift.gradient)])
    lines = aligned(rows, num_left=2)
    if len(blocks) < len(drift.blocks):
        lines.append(f"({len(blocks)} of {len(drift.blocks)} blocks are shown)")
    if drift.keyframes:
        lines += ["", *_wrapped(f"{_counted(drift.keyframes)}, before {_listed(drift.keyframes)}.")]
    lines += ["", *_wrapped(drift.verdict)]
    if drift.advice:
        lines.append("")
        for number, advice in enumerate(drift.advice, 1):
            lines += _wrapped(f"{number}. {advice}", indent=3)
    return lines


def _counted(keyframes: Sequence[str]) -> str:
    return f"{len(keyframes)} keyframe{'s' * (len(keyframes) != 1)}"


def _listed(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    if len(quoted) > _MOST_NAMES:
        quoted = [*quoted[:_MOST_NAMES], f"{len(quoted) - _MOST_NAMES} more"]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else quoted[0]


def _row(block: BlockDrift, has_gradients: bool) -> list[str]:
    policy = type(block.policy).__name__.lower()
    error = "kept" if block.error is None else f"{block.error:.1e}" if block.error else "0"
    growth = "" if block.amplification is None else f"{block.amplification:.2f}"
    cells = [block.name or "(the model)", f"{policy}, exact" if block.is_exact else policy, error, growth]
    return cells + (_gradient_cells(block.gradient) if has_gradients else [])


def _gradient_cells(gradient: GradientDrift | None) -> list[str]:
    if gradient is None:
        return ["", ""]
    return [f"{gradient.relative_error:.1e}" if gradient.relative_error else "0", f"{gradient.angle_degrees:.2g} deg"]


def _thinned(blocks: Sequence[BlockDrift]) -> list[BlockDrift]:
    """All blocks, or evenly many of them, the first and the last among them."""
    if len(blocks) <= _MOST_ROWS:
        return list(blocks)
    last = len(blocks) - 1
    shown = sorted({round(index * last / (_MOST_ROWS - 1)) for index in range(_MOST_ROWS)})
    return [blocks[index] for index in shown]


def _wrapped(text: str, indent: int = 0) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
