"""Checks of the arguments that all models have."""

from collections.abc import Sequence


def check_positive(**counts: int) -> None:
    """Raise unless each of `counts` is a positive integer."""
    for name, count in counts.items():
        if not _is_integer(count) or count < 1:
            raise ValueError(f"`{name}` (={count!r}) must be a positive integer.")


def check_share(**shares: float) -> None:
    """Raise unless each of `shares` is a number from 0 to below 1."""
    for name, share in shares.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1:
            raise ValueError(f"`{name}` (={share!r}) must be a number from 0 to below 1; 0 drops nothing.")


def check_num_classes(num_classes: int) -> None:
    """Raise unless `num_classes` is a positive integer, or 0."""
    if not _is_integer(num_classes) or num_classes < 0:
        raise ValueError(
            f"`num_classes` (={num_classes!r}) must be a positive integer, or 0 for pooled features in place of logits."
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` (={value!r}) must be {' or '.join(map(repr, choices))}.")


def check_stages(
    num_blocks: Sequence[int], widths: Sequence[int], *, multiple_of: int = 1, may_shrink: bool = False
) -> None:
    """Raise unless `widths` gives a width to the stem and to each stage of `num_blocks`."""
    for name, counts in (("num_blocks", num_blocks), ("widths", widths)):
        if not isinstance(counts, Sequence) or isinstance(counts, str):
            raise TypeError(f"`{name}` (={counts!r}) must be a sequence of integers, for instance (3, 3, 3).")
    if not num_blocks:
        raise ValueError(f"`num_blocks` (={num_blocks!r}) must name at least one stage, for instance (3, 3, 3).")
    for stage, count in enumerate(num_blocks):
        check_positive(**{f"num_blocks[{stage}]": count})
    if len(widths) != len(num_blocks) + 1:
        raise ValueError(
            f"`widths` (={tuple(widths)}) must have one width for the stem and one for each of the {len(num_blocks)} "
            f"stages of `num_blocks`, {len(num_blocks) + 1} in all."
        )
    for stage, width in enumerate(widths):
        check_positive(**{f"widths[{stage}]": width})
        if width % multiple_of:
            raise ValueError(
                f"`widths[{stage}]` (={width}) must be a multiple of {multiple_of}, since a reversible block splits "
                f"the channels in two; use {width + multiple_of - width % multiple_of}."
            )
        if stage and width < widths[stage - 1] and not may_shrink:
            raise ValueError(
                f"`widths` (={tuple(widths)}) must not shrink: the shortcut between stages of basic blocks can only "
                "add channels; widen the later ones, or use block='bottleneck', whose shortcut is a convolution."
            )


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
