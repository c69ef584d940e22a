"""Checks of the arguments that all models have."""

from collections.abc import Sequence


def check_positive(**counts: int) -> None:
    """Raise unless each of `counts` is a positive integer."""
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"`{name}` (={count!r}) must be a positive integer.")


def check_stages(num_blocks: Sequence[int], widths: Sequence[int], *, multiple_of: int = 1) -> None:
    """Raise unless `widths` gives a width to the stem and to each stage of `num_blocks`."""
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
        if stage and width < widths[stage - 1]:
            raise ValueError(
                f"`widths` (={tuple(widths)}) must not shrink: the shortcut between stages can only add channels."
            )
