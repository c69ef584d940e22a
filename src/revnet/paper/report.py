"""The table of finished runs, beside the paper's numbers: Markdown to read, CSV to compute with."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

from revnet.models import AbstractImageClassifier, create_model
from revnet.paper.tables import Row, Table
from revnet.training import TrainConfig


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """What one finished run came to."""

    model: str
    """Name of the model."""
    seed: int
    """Seed of the run."""
    num_parameters: int
    """Parameters of the model."""
    test_error: float
    """Test error in per cent, with the last weights."""
    num_updates: int
    """Updates made."""
    batch_size: int
    """Images per update."""
    precision: str
    """Arithmetic of the run."""
    train_seconds: float
    """Time of all epochs."""
    step_seconds: float
    """Median time of an update."""
    peak_bytes: int
    """Activation memory of an update at its peak."""
    stored_peak_bytes: int | None
    """The same of the stored twin of a reversible model."""
    process_peak_bytes: int | None
    """The most memory that the process ever had."""
    hardware: str
    """Where it ran."""
    versions: str
    """What it ran with."""
    date: str
    """When it ended."""
    paper_error: float | None
    """Test error in the paper, in per cent, for the paper's recipe."""
    rerun_error: float | None
    """Test error of the official code, in per cent."""


def write_report(table: Table, output_dir: Path, command: str) -> list[RunFigures]:
    """Write `table.md` and `table.csv` of all finished runs in `output_dir`; returns their figures."""
    figures = [run for row in table.rows for run in _read_runs(table, row, output_dir)]
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "table.md").write_text("\n".join(format_report(table, figures, command)) + "\n")
    with (output_dir / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(RunFigures.__dataclass_fields__))
        writer.writeheader()
        writer.writerows(asdict(run) for run in figures)
    return figures


def format_report(table: Table, figures: Sequence[RunFigures], command: str) -> list[str]:
    """The lines of the Markdown page."""
    lines = [f"# The table `{table.name}`, reproduced", ""]
    if not figures:
        return [*lines, "No run has finished yet."]
    for name, values in (
        ("Hardware", [run.hardware for run in figures]),
        ("Versions", [run.versions for run in figures]),
        ("Date", [run.date for run in figures]),
    ):
        lines.append(f"- {name}: {'; '.join(sorted(set(values)))}")
    updates = ", ".join(f"{count:,}" for count in sorted({run.num_updates for run in figures}))
    batches = ", ".join(str(size) for size in sorted({run.batch_size for run in figures}))
    precisions = ", ".join(sorted({run.precision for run in figures}))
    return [
        *lines,
        f"- Command: `{command}`",
        f"- Recipe: `configs/{table.recipe}`; budget: {updates} updates of {batches} images, {precisions}",
        "- Test error with the last weights; the test set is read once. Paper: recalled. Official: a rerun of its",
        "  code by the authors of memcnn (CIFAR), or its README (ImageNet). Both after the paper's full budget.",
        "- Activations: what an update needs at its peak above parameters and gradients, counted. Process: the most",
        "  that the process ever had, data and libraries included.",
        "",
        "| model | parameters | seeds | test error % | mean | paper | official | activations MiB | stored twin MiB "
        "| process MiB | step ms | hours |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_line(row, runs) for row in table.rows if (runs := [run for run in figures if run.model == row.model])),
        *_comparisons(table, figures),
    ]


def _line(row: Row, runs: Sequence[RunFigures]) -> str:
    errors = [run.test_error for run in runs]
    spread = f" ± {stdev(errors):.2f}" if len(errors) > 1 else ""
    first = runs[0]
    processes = [run.process_peak_bytes for run in runs if run.process_peak_bytes is not None]
    return " | ".join(
        [
            f"| {row.model}",
            f"{first.num_parameters:,}",
            ", ".join(str(run.seed) for run in runs),
            ", ".join(f"{error:.2f}" for error in errors),
            f"{mean(errors):.2f}{spread}",
            _number(row.paper_error),
            _number(row.rerun_error),
            _mebibytes(first.peak_bytes),
            _mebibytes(first.stored_peak_bytes),
            _mebibytes(max(processes, default=None)),
            f"{1000 * mean(run.step_seconds for run in runs):.0f}",
            f"{mean(run.train_seconds for run in runs) / 3600:.2f} |",
        ]
    )


def _comparisons(table: Table, figures: Sequence[RunFigures]) -> list[str]:
    """A sentence for each RevNet whose ResNet has runs of the same seeds."""
    lines = []
    for row in table.rows:
        if not _skeleton(row.model, table.num_classes).is_reversible:
            continue
        errors = {run.seed: run.test_error for run in figures if run.model == row.model}
        others = {run.seed: run.test_error for run in figures if run.model == row.pair}
        differences = [errors[seed] - others[seed] for seed in sorted(errors.keys() & others.keys())]
        if differences:
            seeds = f"{len(differences)} seed{'s' * (len(differences) > 1)}"
            listed = ", ".join(f"{difference:+.2f}" for difference in differences)
            lines.append(f"{row.model} less {row.pair}: {mean(differences):+.2f} points over {seeds} ({listed}).")
    return ["", *lines] if lines else []


def _read_runs(table: Table, row: Row, output_dir: Path) -> list[RunFigures]:
    folders = {folder: folder.name.partition("_seed")[2] for folder in output_dir.glob(f"{row.model}_seed*")}
    finished = [folder for folder, seed in folders.items() if seed.isdecimal() and (folder / "summary.json").is_file()]
    return [_read_run(table, row, folder) for folder in sorted(finished, key=lambda folder: int(folders[folder]))]


def _read_run(table: Table, row: Row, folder: Path) -> RunFigures:
    summary = json.loads((folder / "summary.json").read_text())
    config = TrainConfig.load(folder / "config.yaml")
    hardware, versions, date, *_ = (line.partition(": ")[2] for line in summary["machine"])
    model = _skeleton(row.model, table.num_classes)
    return RunFigures(
        model=row.model,
        seed=config.seed,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        test_error=100 * summary["test_error"],
        num_updates=summary["num_updates"],
        batch_size=config.batch_size,
        precision=config.precision,
        train_seconds=summary["train_seconds"],
        step_seconds=summary["step_seconds"],
        peak_bytes=summary["peak_bytes"],
        stored_peak_bytes=summary["stored_peak_bytes"],
        process_peak_bytes=summary["process_peak_bytes"],
        hardware=hardware,
        versions=versions,
        date=date,
        paper_error=row.paper_error,
        rerun_error=row.rerun_error,
    )


def _skeleton(model: str, num_classes: int) -> AbstractImageClassifier:
    with torch.device("meta"):
        return create_model(model, num_classes=num_classes)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mebibytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**20:.1f}"
