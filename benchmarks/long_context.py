"""Find the longest context that language models can train with on one GPU, by prediction.

    python benchmarks/long_context.py

Writes long-context_<hardware>_<date>.md and its CSV to benchmarks/results/. Nothing runs and no GPU is needed.
"""

import argparse
import datetime
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from _memory_page import Row, table, write_csv
from torch import nn

from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.memory import format_bytes, predict
from revnet.models import ReversibleTransformer
from revnet.nn import set_policy

RESULTS = Path(__file__).parent / "results"
CARDS = (8, 24, 80)
"""Memory of the GPUs, in GiB."""
USABLE = 0.9
"""Share of the memory that a step may take; the driver, the libraries and fragments take the rest."""
UNIT = 1024
"""Lengths are multiples of this number of tokens."""
METHODS = {
    "reversed": ("reverse", False),
    "reversed, step in backward": ("reverse", True),
    "checkpointed": ("checkpoint", False),
    "stored": ("store", False),
}
"""Policy, and whether the optimizer steps in the backward pass."""
STEP = "--input-dtype int64 --loss chunked --optimizer adamw --precision bf16-mixed"
"""Flags of a step for `revnet memory`."""


@dataclass(frozen=True)
class Size:
    """A size of language model."""

    dim: int
    depth: int
    num_heads: int
    vocab_size: int = 50_257


SIZES = {
    "small": Size(768, 12, 12),
    "medium": Size(1024, 24, 16),
    "large": Size(1600, 48, 25),
}


def make_model(size: str) -> ReversibleTransformer:
    """Return a model whose context is not limited."""
    options = SIZES[size]
    return ReversibleTransformer(
        vocab_size=options.vocab_size,
        dim=options.dim,
        depth=options.depth,
        num_heads=options.num_heads,
        max_length=2**24,
    )


# For the commands on the page, such as `revnet memory long_context:small`.
small, medium, large = (partial(make_model, size) for size in SIZES)


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict, and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if not given.out_dir.is_dir():
        parser.error(f"--out-dir {given.out_dir} is not a folder; create it first")
    rows: list[Row] = []
    for size in given.sizes:
        for method in METHODS:
            rows += find_lengths(size, method)
            print(rows[-1], file=sys.stderr, flush=True)
    stem = f"long-context_{hardware_name()}_{datetime.date.today()}"
    page = [
        "# The longest context of a language model on one GPU",
        "",
        *describe_machine(shlex.join(["python", "benchmarks/long_context.py", *arguments])),
        "",
        *describe(rows),
    ]
    write_csv(rows, given.out_dir / f"{stem}.csv")
    text = "\n".join(page).rstrip() + "\n"
    (given.out_dir / f"{stem}.md").write_text(text)
    print(text)


def find_lengths(size: str, method: str) -> list[Row]:
    """Return the longest context on each card, with its peak."""
    with torch.device("meta"):
        model = make_model(size)
    policy, step_in_backward = METHODS[method]
    set_policy(model, policy)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    peaks: dict[int, int] = {}

    def peak(units: int) -> int:
        if units not in peaks:
            peaks[units] = predict_peak(model, UNIT * units, step_in_backward=step_in_backward)
        return peaks[units]

    rows = []
    for card in CARDS:
        units = longest(peak, int(USABLE * card * 2**30))
        rows.append(
            {
                "size": size,
                "parameters": num_parameters,
                "method": method,
                "card_gib": card,
                "longest": UNIT * units,
                "peak_bytes": peak(units) if units else "",
                "command": command(size, method, UNIT * units) if units else "",
            }
        )
    return rows


def predict_peak(model: nn.Module, length: int, *, step_in_backward: bool) -> int:
    """Return the peak of a step on one window, in bytes."""
    tokens = torch.empty(1, length, dtype=torch.int64, device="meta")
    step = predict(
        model,
        tokens,
        kwargs={"targets": torch.empty_like(tokens)},
        optimizer=torch.optim.AdamW,
        autocast=torch.bfloat16,
        step_in_backward=step_in_backward,
        device="cpu",
    )
    return step.peak_bytes


def longest(peak: Callable[[int], int], budget: int) -> int:
    """Return the largest number of units whose peak fits a budget, 0 if none does.

    The peak is the largest of a few linear functions, so the chord between a length that fits and one that does not
    leads to a length that fits.
    """
    if peak(1) > budget:
        return 0
    low, high = 1, 16
    while peak(high) <= budget:
        low, high = high, 4 * high
    while high - low > 1:
        slope = (peak(high) - peak(low)) / (high - low)
        guess = min(max(low + int((budget - peak(low)) / slope), low + 1), high - 1)
        if peak(guess) > budget:
            high = guess
        elif guess + 1 < high and peak(guess + 1) > budget:
            return guess
        else:
            low = min(guess + 1, high - 1)
    return low


def command(size: str, method: str, length: int) -> str:
    """Return the command that predicts a step of a length."""
    policy, step_in_backward = METHODS[method]
    flags = f"{STEP} --step-in-backward" if step_in_backward else STEP
    return f"revnet memory long_context:{size} --policy {policy} --batch 1 --input-shape [{length}] {flags}"


def describe(rows: Sequence[Row]) -> list[str]:
    """Return the text and the tables of the page."""
    lines = [
        "`ReversibleTransformer` with full attention and a vocabulary of 50,257 tokens. A training step on one window:",
        "AdamW in float32, autocast to bfloat16, the loss in chunks. A step may take nine tenths of the memory of the",
        "GPU. Lengths are the largest multiples of 1,024 tokens that fit; the next one does not. Peaks are predicted",
        "for the kernels of the CPU; no GPU has run these steps. The commands, run in `benchmarks/`, print each peak.",
        "",
    ]
    for card in CARDS:
        own = [row for row in rows if row["card_gib"] == card]
        cells = [
            [
                f"{row['size']}, {row['parameters']:,} parameters",
                row["method"],
                f"{row['longest']:,}" if row["longest"] else "none fits",
                format_bytes(row["peak_bytes"]) if row["longest"] else "",
            ]
            for row in own
        ]
        lines += [f"## {card} GiB", "", *table(("model", "activations", "longest context", "peak"), cells)]
        lines += ["```bash", *[str(row["command"]) for row in own if row["command"]], "```", ""]
    return lines


if __name__ == "__main__":
    main()
