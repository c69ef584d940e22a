"""Format a drift as lines of text."""

import textwrap
from collections.abc import Sequence

from revnet._text_table import aligned
from revnet.numerics._block_drift import BlockDrift, GradientDrift

_MOST_ROWS = 40
"""Largest number of blocks to list; of more, evenly spaced ones are shown."""
_MOST_NAMES = 8
_WIDTH = 120


def drift_lines(
    blocks: Sequence[BlockDrift],
    gradient: GradientDrift | None,
    keyframes: Sequence[str],
    verdict: str,
    advice: Sequence[str],
) -> list[str]:
    """Return a table of the blocks, the keyframes, the verdict and the advice."""
    head = ["block", "policy", "error", "amplification"]
    rows = [head + (["gradient error", "angle"] if gradient is not None else [])]
    shown = _thinned(blocks)
    rows += [_row(block, has_gradients=gradient is not None) for block in shown]
    if gradient is not None:
        rows.append(["(the model)", "", "", "", *_gradient_cells(gradient)])
    lines = aligned(rows, num_left=2)
    if len(shown) < len(blocks):
        lines.append(f"({len(shown)} of {len(blocks)} blocks are shown)")
    if keyframes:
        lines += ["", *_wrapped(f"{_counted(keyframes)}, before {_listed(keyframes)}.")]
    lines += ["", *_wrapped(verdict)]
    if advice:
        lines.append("")
        for number, sentence in enumerate(advice, 1):
            lines += _wrapped(f"{number}. {sentence}", indent=3)
    return lines


def _counted(keyframes: Sequence[str]) -> str:
    return f"{len(keyframes)} keyframe{'s' * (len(keyframes) != 1)}"


def _listed(names: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    if len(quoted) > _MOST_NAMES:
        quoted = [*quoted[:_MOST_NAMES], f"{len(quoted) - _MOST_NAMES} more"]
    return " and ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else quoted[0]


def _row(block: BlockDrift, *, has_gradients: bool) -> list[str]:
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
    """Return all blocks, or `_MOST_ROWS` evenly spaced ones with the first and the last."""
    if len(blocks) <= _MOST_ROWS:
        return list(blocks)
    last = len(blocks) - 1
    shown = sorted({round(index * last / (_MOST_ROWS - 1)) for index in range(_MOST_ROWS)})
    return [blocks[index] for index in shown]


def _wrapped(text: str, indent: int = 0) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
