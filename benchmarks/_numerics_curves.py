"""Second table of `numerics.py`: drift during training, and the cost of the drift meter."""

import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from _memory_page import Row, Section, table
from _numerics_nets import Digits, PerceptronClassifier
from torch import nn

from revnet import FixedPoint, ReconstructionWarning, set_coupling, set_tolerance
from revnet._figure import clear_frame, new_figure, save
from revnet._palette import BLUE, GREEN, RED, YELLOW
from revnet.engine import DriftMeter
from revnet.numerics import drift_of, measure_drift

DEPTH, WIDTH, SCALE, BATCH, LR = 32, 32, 3, 50, 3e-3
EVERY, GRADIENTS_EVERY = 5, 50
NUM_TIMED = 15
ZERO = 1e-10
"""Position of zero on the logarithmic axis."""


@dataclass(frozen=True)
class Mode:
    name: str
    color: str
    marker: str
    is_autocast: bool = False
    is_exact: bool = False
    tolerance: float | None = None


MODES = (
    Mode("float32", BLUE, "o"),
    Mode("bfloat16 autocast", RED, "s", is_autocast=True),
    Mode("bfloat16 autocast, tolerance 1e-3", YELLOW, "^", is_autocast=True, tolerance=1e-3),
    Mode("exact", GREEN, "D", is_exact=True),
)


def curves_section(num_steps: int, picture: Path) -> Section:
    """Train in each mode, from the same weights with the same batches."""
    curves = {mode: trained(mode, num_steps) for mode in MODES}
    plot(curves, picture)
    rows = [row for mode_rows in curves.values() for row in mode_rows]
    cells = []
    for mode, mode_rows in curves.items():
        errors = [row["drift"] for row in mode_rows]
        gradients = [row["gradient_error"] for row in mode_rows if row["gradient_error"] is not None]
        cells.append(
            [
                mode.name,
                number(median(errors)),
                number(max(errors)),
                number(max(gradients)),
                str(max(row["keyframes"] for row in mode_rows)),
                f"{mode_rows[0]['loss']:.3f}",
                f"{mode_rows[-1]['loss']:.3f}",
            ]
        )
    step, watched = meter_cost()
    head = ["", "median error", "largest", "gradients, largest", "most keyframes", "first loss", "last loss"]
    lines = [
        "## Drift during training",
        "",
        f"{DEPTH} perceptron blocks of {WIDTH} features, initial weights times {SCALE}, on the digits: {num_steps}",
        f"updates of {BATCH} images by Adam, learning rate {LR:g}; the same weights and batches in all modes. *Error*:",
        f"the largest error of any block, measured every {EVERY} updates within the update; for gradients, the",
        f"difference to the stored twin, every {GRADIENTS_EVERY} updates.",
        "",
        *table(head, cells),
        f"![Errors during training in four modes]({picture.name})",
        "",
        f"An update with the meter took {watched:.1f} ms and one without {step:.1f} ms (medians of {NUM_TIMED} each, "
        f"in turn), {100 * (watched / step - 1):+.1f} %;",
        f"at every 100th update this is {(watched / step - 1):+.3f} % of the time.",
        "",
    ]
    return Section(lines, rows)


def trained(mode: Mode, num_steps: int) -> list[Row]:
    model, optimizer = build(mode)
    digits = Digits(BATCH, seed=1)
    rows: list[Row] = []
    for step in range(num_steps):
        images, labels = digits.batch()
        gradient_error = None
        is_measured = step % EVERY == 0 or step == num_steps - 1
        if step % GRADIENTS_EVERY == 0 or step == num_steps - 1:
            with autocast(mode):
                drift = measure_drift(
                    model,
                    images,
                    loss=lambda logits, labels=labels: F.cross_entropy(logits, labels),
                    gradients=True,
                    autocast=torch.bfloat16 if mode.is_autocast else None,
                )
            assert drift.gradient is not None
            gradient_error = drift.gradient.relative_error
        meter = DriftMeter(is_quiet=True)
        with meter.on() if is_measured else nullcontext(), autocast(mode), warnings.catch_warnings():
            warnings.simplefilter("ignore", ReconstructionWarning)
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReconstructionWarning)
            loss.backward()
        optimizer.step()
        if is_measured:
            drift = drift_of(model, meter.records)
            rows.append(
                {
                    "mode": mode.name,
                    "update": step,
                    "drift": drift.error,
                    "amplification": drift.amplification,
                    "keyframes": len(drift.keyframes),
                    "gradient_error": gradient_error,
                    "loss": loss.item(),
                }
            )
    print(mode.name, rows[-1], flush=True)
    return rows


def build(mode: Mode) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = PerceptronClassifier(DEPTH, WIDTH, SCALE)
    if mode.is_exact:
        set_coupling(model, FixedPoint())
    set_tolerance(model, mode.tolerance)
    return model, torch.optim.Adam(model.parameters(), lr=LR)


def autocast(mode: Mode) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=mode.is_autocast)


def meter_cost() -> tuple[float, float]:
    """Return the milliseconds of an update without and with the meter, measured in turn."""
    model, optimizer = build(MODES[0])
    digits = Digits(BATCH, seed=1)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for turn in range(2 * NUM_TIMED + 4):
        images, labels = digits.batch()
        is_measured = turn % 2 == 1
        start = time.perf_counter()
        meter = DriftMeter()
        with meter.on() if is_measured else nullcontext():
            loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if is_measured:
            drift_of(model, meter.records)
        if turn >= 4:  # after warming up
            seconds[is_measured].append(time.perf_counter() - start)
    return 1000 * median(seconds[False]), 1000 * median(seconds[True])


def number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def plot(curves: dict[Mode, list[Row]], path: Path) -> None:
    """Draw the largest error of each measured update, one color per mode."""
    figure = new_figure(8.5, 4.6)
    axes = figure.subplots()
    clear_frame(axes)
    axes.set_yscale("log")
    axes.set_xlabel("update")
    axes.set_ylabel("largest relative error of any block")
    for mode, rows in curves.items():
        points = [(row["update"], row["drift"] or ZERO) for row in rows]
        has_jumps = mode.is_autocast
        axes.plot(
            *zip(*points, strict=True),
            color=mode.color,
            marker=mode.marker,
            markersize=4.5 if has_jumps else 3.5,
            linewidth=0.5 if has_jumps else 1.6,
            alpha=0.95,
            label=mode.name,
            clip_on=False,
        )
    axes.set_ylim(ZERO, 1)
    axes.axhspan(1e-2, 1, color=RED, alpha=0.08, linewidth=0)
    axes.axhspan(ZERO, 1e-3, color=BLUE, alpha=0.05, linewidth=0)
    axes.set_yticks([ZERO, 1e-8, 1e-6, 1e-4, 1e-2, 1], ["0", "$10^{-8}$", "$10^{-6}$", "$10^{-4}$", "$10^{-2}$", "1"])
    axes.minorticks_off()
    axes.set_xlim(0, max(row["update"] for rows in curves.values() for row in rows))
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    save(figure, path)
