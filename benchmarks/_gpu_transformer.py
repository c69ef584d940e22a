"""A part of `gpu.py`: a transformer on sequences of increasing length."""

import statistics
from collections.abc import Iterator, Sequence
from functools import partial

from _gpu_nets import OPTIMIZER, inputs_of, make, training_step
from _gpu_part import Part, Setting
from _gpu_step import attempt, low_precision, release, take_turns, watch
from _memory_page import Row, mib, table

from revnet import AbstractPolicy, Checkpoint, Reverse, Store

LENGTHS = (1024, 4096, 16384, 65536)
QUICK_LENGTHS = (8, 16)
POLICIES: Sequence[AbstractPolicy] = (Reverse(), Checkpoint(), Store())
SECONDS = 4.0
"""Time for the rounds of one length."""


def rows(setting: Setting) -> Iterator[Row]:
    """Measure each length with each policy."""
    name, lengths = ("tiny transformer", QUICK_LENGTHS) if setting.quick else ("transformer", LENGTHS)
    for length in lengths:
        x = inputs_of(name, length).to(setting.device)
        for policy in POLICIES:
            model = make(name, policy).to(setting.device)
            optimizer = OPTIMIZER(model.parameters())
            step = partial(training_step, model, x, optimizer, low_precision(setting.device))
            row: Row = {"tokens": length, "policy": str(policy), "step_ms": None, "tokens_per_second": None}
            row |= {"grown_bytes": None, "note": attempt(step, setting.device)}
            if not row["note"]:
                row["grown_bytes"] = watch(step, setting.device).grown_bytes
                (turns,) = take_turns({"": step}, setting, seconds=SECONDS / len(POLICIES)).values()
                seconds = statistics.median([turn.step_seconds for turn in turns])
                row |= {"step_ms": 1e3 * seconds, "tokens_per_second": length / seconds}
            yield row
            del model, optimizer, step
            release(setting.device)


def lines(rows_of_part: Sequence[Row]) -> list[str]:
    """Return the lines of the table."""
    return [
        "`ReversibleTransformer(vocab_size=256, dim=512, depth=12, num_heads=8)`, causal with full attention; training",
        "steps on one sequence, with 16-bit autocast, SGD and momentum. The policies run one after the other, so that",
        "none takes memory from another. *Peak* is the peak minus the memory allocated before the step.",
        "",
        *table(("tokens", "policy", "tokens/s", "step, ms", "peak, MiB"), [_cells(row) for row in rows_of_part]),
    ]


def _cells(row: Row) -> list[str]:
    start = [f"{row['tokens']:,}", f"`{row['policy']}`"]
    if row["step_ms"] is None:
        return [*start, row["note"], "", ""]
    return [*start, f"{row['tokens_per_second']:,.0f}", f"{row['step_ms']:.1f}", mib(row["grown_bytes"])]


TRANSFORMER = Part("transformer", "A transformer on long sequences", 60, rows, lines)
