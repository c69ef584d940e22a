"""Third table of `numerics.py`: training with floating-point and with exact reversal, from the same seeds."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from _memory_page import Row, Section, table

from revnet.training import TrainConfig, train
from revnet.training.recipes import find_recipe

RECIPE = "cifar10/quick/revnet38"
MODES = {"float": False, "exact": True}


def accuracy_section(data: str, num_updates: int, seeds: Sequence[int]) -> Section:
    """Train and test each mode with each seed, in turn."""
    rows = [_trained(data, num_updates, seed, mode) for seed in seeds for mode in MODES]
    cells = [
        [
            str(row["mode"]),
            str(row["seed"]),
            f"{row['train_loss']:.4f}",
            f"{row['test_error_percent']:.2f}",
            f"{row['step_ms']:.0f}",
        ]
        for row in rows
    ]
    errors = {mode: [row["test_error_percent"] for row in rows if row["mode"] == mode] for mode in MODES}
    losses = {mode: [row["train_loss"] for row in rows if row["mode"] == mode] for mode in MODES}
    lines = [
        "## Accuracy: float against exact",
        "",
        f"RevNet-38 on CIFAR-10 by `configs/{RECIPE}.yaml`, but in float32 and for {num_updates:,} updates of 100",
        "images; exact is `revnet train --exact`, on a grid of 14 fraction bits. Train loss: last epoch. Test",
        "error: all 10,000 test images, once, with the last weights.",
        "",
        *table(["mode", "seed", "train loss", "test error, %", "step, ms"], cells),
        f"On average {_summarize(errors, ' %')} test error, {_summarize(losses, '')} train loss: exact minus float",
        f"{mean(errors['exact']) - mean(errors['float']):+.2f} points and "
        f"{mean(losses['exact']) - mean(losses['float']):+.4f}. The runs followed each other on a shared machine, so",
        "their step times cannot be compared.",
        "",
    ]
    return Section(lines, rows)


def _trained(data: str, num_updates: int, seed: int, mode: str) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            TrainConfig.load(Path(find_recipe(RECIPE))),
            data=data,
            max_updates=num_updates,
            precision="32-true",
            seed=seed,
            exact=MODES[mode],
            out_dir=str(Path(folder) / "run"),
        )
        result = train(config, quiet=True)
        log = (Path(folder) / "run" / "metrics.csv").read_text().splitlines()
    last = dict(zip(log[0].split(","), log[-1].split(","), strict=True))
    row = {
        "mode": mode,
        "seed": seed,
        "updates": result.num_updates,
        "train_loss": float(last["train_loss"]),
        "test_error_percent": 100 * result.test.error,
        "step_ms": 1000 * result.step_seconds,
    }
    print(row, flush=True)
    return row


def _summarize(values: dict[str, list[float]], unit: str) -> str:
    def spread(numbers: list[float]) -> str:
        return f" (spread {stdev(numbers):.2g})" if len(numbers) > 1 else ""

    return ", ".join(f"{mode} {mean(numbers):.4g}{unit}{spread(numbers)}" for mode, numbers in values.items())
