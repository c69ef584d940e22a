"""Reversible schemes: how far streams and gradients drift by depth, and the exact couplings at 1,000 functions.

    python benchmarks/schemes.py

Residual functions are small perceptrons with layer norm, on streams of 64 features, batch 32. Writes a page and its
CSV to benchmarks/results/.
"""

import argparse
import datetime
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from _memory_page import Row, Section, table, write_csv
from torch import Tensor, nn

from revnet import ReconstructionError, Reverse, ReversibleBlock, ReversibleSequential, Store, set_policy
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.coupling import BDIA, AbstractCoupling, ExactScaled, Scaled
from revnet.memory import measure, predict
from revnet.nn import LeapfrogBlock, MomentumBlock

RESULTS = Path(__file__).parent / "results"
DIM, BATCH = 64, 32
PRECISIONS = {"float32": False, "bf16 autocast": True}
EXACT_FUNCTIONS = 1000


def perceptron() -> nn.Module:
    """Return a residual function whose output is a tenth of its input."""
    function = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM))
    with torch.no_grad():
        function[-1].weight.mul_(0.3)
    return function


Couplings = AbstractCoupling | tuple[AbstractCoupling, AbstractCoupling]


def blocks_of(coupling: Couplings) -> Callable[[], nn.Module]:
    """Return a function that makes a block of two functions."""
    return lambda: ReversibleBlock(perceptron(), perceptron(), split_dim=-1, coupling=coupling)


SCHEMES: Mapping[str, tuple[float, Callable[[], nn.Module]]] = {
    name: (coupling.growth, blocks_of(coupling))
    for name, coupling in {
        "euler(1)": Scaled.euler(),
        "midpoint(0.5)": Scaled.midpoint(),
        "leapfrog(0.5), recurrence": Scaled.leapfrog(0.5),
        "momentum(0.9), two-step": Scaled.momentum(0.9),
        "equilibrium(0.2)": Scaled.equilibrium(0.2),
        "dual(0.1, 0.9)": Scaled.dual(0.1, 0.9),
        "dual(0.3, 0.7)": Scaled.dual(0.3, 0.7),
        "consistent(0.5)": Scaled.consistent(0.5),
        "consistent(-0.5)": Scaled.consistent(-0.5),
    }.items()
} | {
    "LeapfrogBlock(0.5), two of them": (
        1.0,
        lambda: nn.ModuleList([LeapfrogBlock(perceptron(), step_size=0.5, split_dim=-1) for _ in range(2)]),
    ),
    "MEFT(0.1, 0.1)": (10.0, blocks_of((Scaled(0.1), Scaled(0.1)))),
    "MomentumBlock(0.9), two of them": (
        1 / 0.9,
        lambda: nn.ModuleList([MomentumBlock(perceptron(), gamma=0.9, split_dim=-1) for _ in range(2)]),
    ),
}
"""Growth of errors per function, and a function that makes a block, or blocks, of two functions."""
EXACT: Mapping[str, ExactScaled | BDIA] = {
    "midpoint(0.025)": ExactScaled(Scaled.midpoint(0.025)),
    **{f"Scaled({a:g}, 0.05, {1 - a:g})": ExactScaled(Scaled(a, 0.05, 1 - a)) for a in (0.9, 0.7, 0.5, 0.25, 0.1)},
    **{f"Scaled({a:g}, 0.05, 0)": ExactScaled(Scaled(a, 0.05, 0.0)) for a in (-0.9, -0.7, -0.5, -0.25, -0.1)},
    "BDIA(0.5)": BDIA(0.5),
    "BDIA(0.25)": BDIA(0.25),
}


class Times(nn.Module):
    """Multiply by a constant."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        return x * self.factor


def sequence_of(make: Callable[[], nn.Module], num_blocks: int) -> ReversibleSequential:
    """Return a sequence of blocks."""
    blocks: list[nn.Module] = []
    for _ in range(num_blocks):
        block = make()
        blocks += list(block) if isinstance(block, nn.ModuleList) else [block]
    return ReversibleSequential(*blocks)


def outcome(model: ReversibleSequential, x: Tensor, *, autocast: bool) -> list[Tensor]:
    """Return the output and all gradients of a step."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(x)
    torch.manual_seed(2)
    gradients = torch.autograd.grad((y * torch.randn_like(y)).sum(), [x, *model.parameters()])
    return [y.detach(), *gradients]


def drift_rows(depths: Sequence[int]) -> list[Row]:
    """Measure each scheme in each precision at each depth."""
    rows = []
    for name, (growth, make) in SCHEMES.items():
        for depth in depths:
            torch.manual_seed(0)
            model = sequence_of(make, depth)
            x = torch.randn(BATCH, 2 * DIM)
            for precision, autocast in PRECISIONS.items():
                with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    rebuilt = model.inverse(model(x))
                row: Row = {"scheme": name, "growth": growth, "num_blocks": depth, "precision": precision}
                row["stream_error"] = relative([rebuilt], [x])
                row["gradient_error"] = gradient_error(model, x, autocast=autocast)
                rows.append(row)
        print(name, file=sys.stderr, flush=True)
    return rows


def gradient_error(model: ReversibleSequential, x: Tensor, *, autocast: bool) -> float:
    """Return the relative error of the gradients of a reversed step; NaN if the step raises."""
    leaf = x.clone().requires_grad_()
    set_policy(model, Store())
    expected = outcome(model, leaf, autocast=autocast)[1:]
    set_policy(model, Reverse())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return relative(outcome(model, leaf, autocast=autocast)[1:], expected)
        except ReconstructionError:
            return float("nan")


def relative(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the length of the difference relative to the expected length."""
    difference = sum(float((one - other).double().square().sum()) for one, other in zip(actual, expected, strict=True))
    return (difference / sum(float(other.double().square().sum()) for other in expected)) ** 0.5


def exact_rows() -> list[Row]:
    """Compare exact couplings with their stored twins at 1,000 functions, with dropout, and count their bytes."""
    rows = []
    for name, coupling in EXACT.items():

        def make(coupling: AbstractCoupling = coupling) -> nn.Module:
            functions = [nn.Sequential(perceptron(), nn.Dropout(0.1)) for _ in range(2)]
            if isinstance(coupling, BDIA):  # Residuals as small as the other couplings have.
                functions = [nn.Sequential(function, Times(0.05)) for function in functions]
            return ReversibleBlock(*functions, split_dim=-1, coupling=coupling)

        torch.manual_seed(0)
        model = sequence_of(make, EXACT_FUNCTIONS // 2)
        x = torch.randn(BATCH, 2 * DIM, requires_grad=True)
        row: Row = {"coupling": name, "num_bits": coupling.num_bits}
        for precision, autocast in PRECISIONS.items():
            results = []
            for policy in (Store(), Reverse()):
                set_policy(model, policy)
                torch.manual_seed(1)
                results.append(outcome(model, x, autocast=autocast))
            row[f"is_equal_{precision}"] = all(map(torch.equal, *results))
        counted, predicted = (way(model, x).held_bytes for way in (measure, predict))
        if counted != predicted:
            raise RuntimeError(f"{name}: counted {counted:,} bytes, predicted {predicted:,}")
        num_kept = EXACT_FUNCTIONS - 1
        signs = num_kept * BATCH if isinstance(coupling, BDIA) else 0
        row |= {"held_bytes": counted, "bits_bytes": num_kept * BATCH * DIM * coupling.num_bits // 8 + signs}
        set_policy(model, Store())
        row["stored_bytes"] = measure(model, x).held_bytes
        rows.append(row)
        print(name, file=sys.stderr, flush=True)
    return rows


def drift_section(depths: Sequence[int]) -> Section:
    """Return the tables of drift."""
    rows = drift_rows(depths)
    lines = [
        "## Drift",
        "",
        "Relative error of the input as `inverse` rebuilds it, and of all gradients of a reversed step, next to the",
        "stored twin. A block has two residual functions. *Growth* is the factor by which an error grows per function",
        "at least. `nan`: the backward pass raised `ReconstructionError`.",
        "",
    ]
    for precision in PRECISIONS:
        cells = []
        for name, (growth, _) in SCHEMES.items():
            own = [row for row in rows if row["scheme"] == name and row["precision"] == precision]
            errors = [f"{row['stream_error']:.0e} / {row['gradient_error']:.0e}" for row in own]
            cells.append([name, f"{growth:.2f}", *errors])
        lines += [f"{precision}:", "", *table(("scheme", "growth", *[f"{depth} blocks" for depth in depths]), cells)]
    return Section(lines, rows)


def exact_section() -> Section:
    """Return the table of exact couplings."""
    rows = exact_rows()
    lines = [
        "## Exact couplings",
        "",
        f"`ExactScaled` and `BDIA` at {EXACT_FUNCTIONS:,} functions with dropout 0.1, `fraction_bits=14`. *Equal*:",
        "outputs and all gradients equal the stored twin's bit for bit. Bytes between the passes, as counted and",
        "predicted; *bits* is the part of the kept bits, and of the signs of BDIA, for all functions but the lowest.",
        "",
    ]
    cells = [
        [
            row["coupling"],
            str(row["num_bits"]),
            *["yes" if row[f"is_equal_{precision}"] else "no" for precision in PRECISIONS],
            f"{row['held_bytes']:,}",
            f"{row['bits_bytes']:,}",
            f"{row['stored_bytes']:,}",
        ]
        for row in rows
    ]
    columns = ("coupling", "bits", "equal in float32", "equal under autocast", "held", "bits", "held by the twin")
    return Section([*lines, *table(columns, cells)], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the page and its CSV."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[12, 48, 200], help="numbers of blocks")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if min(given.depths) < 1:
        parser.error("--depths must be positive")
    stem = f"schemes_{hardware_name()}_{datetime.date.today()}"
    command = shlex.join(["python", "benchmarks/schemes.py", *arguments])
    drift, exact = drift_section(given.depths), exact_section()
    write_csv(drift.rows, given.out_dir / f"{stem}.csv")
    write_csv(exact.rows, given.out_dir / f"{stem}_exact.csv")
    page = "\n".join(["# Reversible schemes", "", *describe_machine(command), "", *drift.lines, *exact.lines])
    (given.out_dir / f"{stem}.md").write_text(page.rstrip() + "\n")
    print(page)


if __name__ == "__main__":
    main()
