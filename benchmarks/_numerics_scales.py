"""First table of `numerics.py`: scaled weights without a bound, with a tolerance, and with exact reversal."""

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from _memory_page import Row, Section, table
from _numerics_nets import perceptrons
from torch import Tensor

from revnet import FixedPoint, ReconstructionWarning, ReversibleSequential, Store, set_coupling, set_policy
from revnet._figure import clear_frame, new_figure, save, write_title
from revnet._palette import BLUE, GREEN, INK, RED, YELLOW
from revnet.numerics import Drift, measure_drift
from revnet.numerics._gradients import angle_and_error, parameter_gradients

DEPTH, WIDTH, BATCH = 32, 64, 64
SCALES = (1, 2, 4, 8)
TOLERANCES = (1e-3, 1e-5)
COLORS = {1: BLUE, 2: GREEN, 4: YELLOW, 8: RED}


def scales_section(picture: Path) -> Section:
    """Measure each scale without a bound, with each tolerance, and with exact reversal."""
    rows: list[Row] = []
    free: dict[int, Drift] = {}
    for scale in SCALES:
        torch.manual_seed(0)
        model, x = perceptrons(DEPTH, WIDTH, scale), torch.randn(BATCH, 2 * WIDTH)
        reference = stored_error(model, x)
        free[scale] = measure_drift(model, x, loss=loss, gradients=True)
        rows.append(row_of(scale, "none", free[scale], reference))
        for tolerance in TOLERANCES:
            model.tolerance = tolerance
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ReconstructionWarning)
                loss(model(x)).backward()  # chooses the keyframes, which later steps keep
            rows.append(row_of(scale, f"{tolerance:g}", measure_drift(model, x, loss=loss, gradients=True), reference))
        model.tolerance = None
        set_coupling(model, FixedPoint(fraction_bits=12))
        rows.append(row_of(scale, "exact", measure_drift(model, x, loss=loss, gradients=True), reference))
    plot(free, picture)
    cells = [
        [
            f"x {row['scale']}, {row['guard'] if row['guard'] in ('none', 'exact') else 'tolerance ' + row['guard']}",
            number(row["drift"]),
            "" if row["amplification"] is None else f"{row['amplification']:.2f}",
            str(row["keyframes"]),
            number(row["gradient_error"]),
            f"{row['gradient_angle_degrees']:.2g}",
            number(row["stored_float32_error"]),
        ]
        for row in rows
    ]
    head = ["weights", "error", "amplification", "keyframes", "gradient error", "angle, degrees", "float32 error"]
    lines = [
        "## Scaled weights: drift, and the effect of a tolerance",
        "",
        f"{DEPTH} blocks, F, G = Linear-tanh-Linear of {WIDTH} features with PyTorch's initial weights, scaled; batch",
        f"{BATCH}, float32, loss: the mean square. *Error*: the largest relative error of a block's rebuilt input,",
        "from the meter. *Amplification*: average per block. *Gradient error*: all parameters, relative to the stored",
        "twin of the same network. *float32 error*: the difference between plain autograd in float32 and in float64,",
        "for the network without rounding to a grid. Exact: `FixedPoint(fraction_bits=12)`. The figure has no bound.",
        "",
        *table(head, cells),
        f"![Errors by depth for weights scaled by 1, 2, 4 and 8]({picture.name})",
        "",
    ]
    return Section(lines, rows)


def loss(y: Tensor) -> Tensor:
    return y.square().mean()


def row_of(scale: int, guard: str, drift: Drift, reference: float) -> Row:
    assert drift.gradient is not None
    return {
        "scale": scale,
        "guard": guard,
        "drift": drift.error,
        "amplification": drift.amplification,
        "keyframes": len(drift.keyframes),
        "gradient_error": drift.gradient.relative_error,
        "gradient_angle_degrees": drift.gradient.angle_degrees,
        "stored_float32_error": reference,
    }


def stored_error(model: ReversibleSequential, x: Tensor) -> float:
    """Return the error of plain autograd's gradients relative to float64."""
    gradients = []
    for twin, inputs in ((deepcopy(model), x), (deepcopy(model).double(), x.double())):
        set_policy(twin, Store())
        gradients.append(list(parameter_gradients(twin, loss, (inputs,), torch.enable_grad).values()))
    return angle_and_error(*gradients)[1]


def number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def plot(drifts: dict[int, Drift], path: Path) -> None:
    """Draw the errors of activations and gradients by depth, one color per scale."""
    figure = new_figure(9, 4)
    panels: list[Any] = list(figure.subplots(1, 2, sharey=True))
    for axes, title in zip(panels, ("rebuilt activations", "gradients of the block"), strict=True):
        clear_frame(axes)
        write_title(axes, title)
        axes.set_yscale("log")
        axes.set_xlabel("block (rebuilt from right to left)")
        axes.axhline(1e-3, color=INK, linewidth=0.8, linestyle=":")
    panels[0].set_ylabel("relative error")
    for scale, drift in drifts.items():
        style = {"color": COLORS[scale], "linewidth": 1.8, "label": f"weights x {scale}"}
        panels[0].plot([block.error for block in drift.blocks], **style)
        panels[1].plot([block.gradient.relative_error for block in drift.blocks if block.gradient], **style)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    save(figure, path)
