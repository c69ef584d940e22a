"""The section of a page about a run of `revnet train`."""

import csv
import json
from argparse import ArgumentParser
from pathlib import Path

from _memory_page import Row, Section, mib, table


def check_run(parser: ArgumentParser, folder: Path) -> None:
    """End the program if the folder holds no finished run."""
    if not (folder / "summary.json").is_file():
        parser.error(f"{folder} is not the folder of a finished run; it has no summary.json")


def training_section(folder: Path) -> Section:
    """Return the results of a run."""
    summary = json.loads((folder / "summary.json").read_text())
    with (folder / "metrics.csv").open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    cells = [
        [row["epoch"], f"{float(row['train_loss']):.3f}", f"{100 * float(row['train_accuracy']):.1f} %"] for row in rows
    ]
    lines = [
        f"## Training {summary['model']} on {summary['data']}",
        "",
        f"{summary['num_updates']:,} updates of {summary['batch_size']} images in {summary['train_seconds'] / 60:.1f}",
        f"minutes: {100 * summary['test_accuracy']:.2f} % of {summary['test_images']:,} test images are correct",
        f"(chance: 10 %). An update needs {mib(summary['peak_bytes'])} MiB of activations, and an update of the stored",
        f"twin {mib(summary['stored_peak_bytes'])} MiB. Training accuracy is on the epoch's augmented images.",
        "",
        *table(("epoch", "training loss", "training accuracy"), cells),
    ]
    return Section(lines, rows)
