"""The section of a page about runs of `revnet train`."""

import csv
import json
import shlex
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml
from _memory_page import Row, Section, mib, table

from revnet._provenance import describe_machine


def check_run(parser: ArgumentParser, folder: Path) -> None:
    """End the program if the folder holds no finished run."""
    if not (folder / "summary.json").is_file():
        parser.error(f"{folder} is not the folder of a finished run; it has no summary.json")


def read_run(folder: Path) -> dict[str, Any]:
    """Return the summary of a run, with its seed."""
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    return {**json.loads((folder / "summary.json").read_text()), "seed": settings["seed"]}


def describe_runs(command: Sequence[str], folders: Sequence[Path], *lines: str, note: str | None) -> list[str]:
    """Return where the page and its runs come from, as a Markdown list.

    Args:
        command: The command that writes the page.
        folders: Folders of the runs.
        lines: Additional lines of the list.
        note: What a reader should know about the runs.
    """
    machines = [line for folder in folders for line in json.loads((folder / "summary.json").read_text())["machine"]]
    return [
        *describe_machine(shlex.join(command)),
        *[line.replace("- ", "- Run: ", 1) for line in dict.fromkeys(machines)],
        *lines,
        *([f"- {note}"] if note else []),
    ]


def read_epochs(folder: Path) -> list[Row]:
    """Return the figures of each epoch of a run."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def epochs_by_seed(folders: Sequence[Path]) -> list[Row]:
    """Return the losses and accuracies of each epoch of runs that differ in their seeds."""
    rows = []
    for folder in folders:
        seed = str(read_run(folder)["seed"])
        for row in read_epochs(folder):
            figures = {name: value for name, value in row.items() if name.endswith(("_loss", "_accuracy"))}
            rows.append({"seed": seed, "epoch": row["epoch"], **figures})
    return rows


def errors_by_seed(summaries: Sequence[Row], published: Mapping[str, tuple[int, float]]) -> list[str]:
    """Return a table of the test errors of runs that differ in their seeds, and of published epochs and errors."""
    epochs = str(summaries[0]["last_epoch"])
    errors = [100 * summary["test_error"] for summary in summaries]
    rows = [
        [f"seed {summary['seed']}", epochs, f"{error:.2f} %"] for summary, error in zip(summaries, errors, strict=True)
    ]
    if len(errors) > 1:
        rows.append(["mean, standard deviation", epochs, f"{mean(errors):.2f} ± {stdev(errors):.2f} %"])
    rows += [[name, str(length), f"{error:.1f} %"] for name, (length, error) in published.items()]
    return table(("run", "epochs", "test error"), rows)


def training_section(folder: Path) -> Section:
    """Return the results of a run."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = read_epochs(folder)
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
