"""A part of `gpu.py`: the head and loss of a language model, with whole and with chunked logits."""

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from _gpu_part import Part, Setting
from _gpu_step import attempt, low_precision, median_ratio, release, take_turns, watch
from _memory_page import Row, mib, table
from torch import Tensor

from revnet.functional import linear_cross_entropy

SECONDS = 6.0
"""Time for the rounds of both methods."""
VOCAB_SIZE, DIM, NUM_TOKENS = 50_257, 1024, 4096
QUICK_SIZES = 100, 8, 16
WHOLE, CHUNKED, OF_PYTORCH = "whole logits", "chunked logits", "chunked logits, PyTorch"


def rows(setting: Setting) -> Iterator[Row]:
    """Measure both methods."""
    vocab_size, dim, num_tokens = QUICK_SIZES if setting.quick else (VOCAB_SIZE, DIM, NUM_TOKENS)
    torch.manual_seed(0)
    dtype = torch.float32 if setting.quick else low_precision(setting.device)
    features = torch.randn(num_tokens, dim, device=setting.device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(vocab_size, dim, device=setting.device, dtype=dtype) / dim**0.5).requires_grad_()
    targets = torch.randint(vocab_size, (num_tokens,), device=setting.device)
    leaves = [features, weight]
    losses: dict[str, Callable[[], Tensor]] = {
        WHOLE: lambda: F.cross_entropy(F.linear(features, weight), targets),
        CHUNKED: lambda: linear_cross_entropy(features, weight, targets),
    }
    row: Row = {"tokens": num_tokens, "vocabulary": vocab_size, "step_ms": None, "ratio": None, "difference": None}
    row |= {"grown_bytes": None, "note": ""}
    # In PyTorch since 2.13.
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        yield row | {"method": OF_PYTORCH, "note": f"skipped: PyTorch {torch.__version__} has no chunked loss"}
    else:
        losses[OF_PYTORCH] = lambda: F.linear_cross_entropy(features, weight, targets, options=options())
    known: dict[str, Row] = {}
    steps: dict[str, Callable[[], None]] = {}
    expected: list[Tensor] = []
    for name, loss in losses.items():
        step = _step_of(loss, leaves)
        note = attempt(lambda step=step: (step(), step()), setting.device)
        known[name] = row | {"method": name, "note": note}
        if not note:
            grads = torch.autograd.grad(loss(), leaves)
            expected = expected or list(grads)
            norms = [
                (grad - own).double().norm() / own.double().norm() for grad, own in zip(grads, expected, strict=True)
            ]
            known[name]["difference"] = float(max(norms))
            del grads
            known[name]["grown_bytes"] = watch(step, setting.device).grown_bytes
            steps[name] = step
    turns = take_turns(steps, setting, seconds=SECONDS)
    reference = [turn.step_seconds for turn in turns.get(WHOLE, [])]
    for name, own in known.items():
        if name in turns:
            seconds = [turn.step_seconds for turn in turns[name]]
            own["step_ms"] = 1e3 * statistics.median(seconds)
            own["ratio"] = median_ratio(seconds, reference) if reference else None
        yield own
    release(setting.device)


def _step_of(loss: Callable[[], Tensor], leaves: Sequence[Tensor]) -> Callable[[], None]:
    def step() -> None:
        loss().backward()
        for leaf in leaves:
            leaf.grad = None

    return step


def lines(rows_of_part: Sequence[Row]) -> list[str]:
    """Return the lines of the table."""
    return [
        "The last linear layer and the cross-entropy, forward and backward, in 16 bits. *Chunked*:",
        "`revnet.functional.linear_cross_entropy`, and PyTorch's function of that name with",
        "`LinearCrossEntropyOptions()`. *Difference*: the largest relative difference of a gradient. *Peak*: the peak",
        "minus the memory before the step.",
        "",
        *table(
            ("method", "tokens", "vocabulary", "step, ms", "step / whole", "peak, MiB", "difference"),
            [_cells(row) for row in rows_of_part],
        ),
    ]


def _cells(row: Row) -> list[str]:
    start = [row["method"], f"{row['tokens']:,}", f"{row['vocabulary']:,}"]
    if row["note"] or row["step_ms"] is None:
        return [*start, row["note"], "", "", ""]
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    difference = f"{row['difference']:.1e}" if row["difference"] else "none"
    return [*start, f"{row['step_ms']:.2f}", ratio, mib(row["grown_bytes"]), difference]


HEAD = Part("head", "Head and loss of a language model", 40, rows, lines)
