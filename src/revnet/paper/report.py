"""Write the table of finished runs and the paper's numbers as Markdown and CSV, and plot the training curves."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from revnet._atomic_file import write_table, write_text
from revnet._documents import read_json
from revnet._figure import try_to_draw
from revnet._provenance import Provenance
from revnet._result_files import IsOwn, begins_with, is_picture, writing_to
from revnet.errors import CheckpointError
from revnet.models import AbstractImageClassifier, create_model
from revnet.paper.curves import plot_curves, read_curve
from revnet.paper.tables import Row, Table
from revnet.training import TrainConfig

_NUMBERS = ("test_error", "num_updates", "train_seconds", "step_seconds")
_TITLE = "# The table"
_OPTIONAL_NUMBERS = ("peak_bytes", "stored_peak_bytes", "process_peak_bytes")


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """Results of one finished run."""

    model: str
    """Name of the model."""
    seed: int
    """Seed of the run."""
    num_parameters: int
    """Number of parameters of the model."""
    test_error: float
    """Test error of the last weights, in percent."""
    num_updates: int
    """Number of updates."""
    batch_size: int
    """Number of images per update."""
    precision: str
    """Precision of the run."""
    train_seconds: float
    """Total time of the epochs."""
    step_seconds: float
    """Median time of an update."""
    peak_bytes: int
    """Peak activation memory of an update."""
    stored_peak_bytes: int | None
    """Peak activation memory of the stored twin, if the model is reversible."""
    process_peak_bytes: int | None
    """Peak memory of the process."""
    hardware: str
    """Hardware of the run."""
    versions: str
    """Versions of PyTorch, Python and revnet."""
    date: str
    """Date of the run."""
    paper_error: float | None
    """Test error in the paper, in percent, for the paper's recipe."""
    rerun_error: float | None
    """Test error of the official code, in percent."""


def report_files() -> dict[str, IsOwn]:
    """Return the names of the page, the table and the picture, and how each is recognized."""
    columns = ",".join(RunFigures.__dataclass_fields__)
    return {
        "table.md": begins_with(_TITLE.encode()),
        "table.csv": begins_with(columns.encode()),
        "table.png": is_picture,
    }


def write_report(table: Table, out_dir: Path, command: str) -> list[RunFigures]:
    """Write `table.md`, `table.csv` and `table.png` of all finished runs in `out_dir`, and return their figures."""
    runs = {folder: run for row in table.rows for folder, run in _read_runs(table, row, out_dir).items()}
    figures = list(runs.values())
    lines = format_report(table, figures, command)
    page, columns, picture = (out_dir / file for file in report_files())
    with writing_to("out_dir", out_dir):
        out_dir.mkdir(parents=True, exist_ok=True)
        if runs and try_to_draw(lambda: _draw(table, runs, picture), picture):
            lines += ["", f"![Training curves of {table.name}]({picture.name})"]
        else:
            picture.unlink(missing_ok=True)  # It would show other runs.
        write_text(page, "\n".join(lines) + "\n")
        write_table(columns, list(RunFigures.__dataclass_fields__), map(asdict, figures))
    return figures


def _draw(table: Table, runs: Mapping[Path, RunFigures], path: Path) -> None:
    curves = [(run.model, run.test_error, read_curve(folder)) for folder, run in runs.items()]
    first = next(iter(runs.values()))
    plot_curves(curves, path, f"{table.name}, {first.num_updates:,} updates of {first.batch_size} images")


def format_report(table: Table, figures: Sequence[RunFigures], command: str) -> list[str]:
    """Return the lines of the Markdown page."""
    lines = [f"{_TITLE} `{table.name}`, reproduced", ""]
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
        "- Test error of the last weights; the test set is read once. Paper: quoted from memory. Official: a rerun of",
        "  the official code by the authors of memcnn (CIFAR), or its README (ImageNet). Both use the paper's budget.",
        "- Activations: counted peak memory of an update, without parameters and gradients. Process: peak memory of",
        "  the process, including data and libraries.",
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
    """Return a sentence for each RevNet whose ResNet has runs with the same seeds."""
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
            lines.append(f"{row.model} minus {row.pair}: {mean(differences):+.2f} points over {seeds} ({listed}).")
    return ["", *lines] if lines else []


def _read_runs(table: Table, row: Row, out_dir: Path) -> dict[Path, RunFigures]:
    """Return the figures of the finished runs of a row, by folder, in the order of the seeds."""
    folders = {folder: folder.name.partition("_seed")[2] for folder in out_dir.glob(f"{row.model}_seed*")}
    finished = [folder for folder, seed in folders.items() if seed.isdecimal() and (folder / "summary.json").is_file()]
    runs = {}
    for folder in sorted(finished, key=lambda folder: int(folders[folder])):
        try:
            runs[folder] = _read_run(table, row, folder)
        except (OSError, TypeError, ValueError) as error:
            warnings.warn(f"`{folder}` is left out of the table: {error}", stacklevel=2)
    return runs


def _read_run(table: Table, row: Row, folder: Path) -> RunFigures:
    summary = _read_summary(folder / "summary.json")
    config = TrainConfig.load(folder / "config.yaml", whole=True)
    provenance = Provenance.parse(summary["machine"])
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
        hardware=provenance.hardware,
        versions=provenance.versions,
        date=provenance.date,
        paper_error=row.paper_error,
        rerun_error=row.rerun_error,
    )


def _read_summary(path: Path) -> dict[str, Any]:
    summary = read_json(path)
    machine = summary.get("machine")
    numbers = {name: summary.get(name) for name in (*_NUMBERS, *_OPTIONAL_NUMBERS)}
    for name, number in numbers.items():
        is_missing = number is None and name in _OPTIONAL_NUMBERS and name in summary
        if not is_missing and (isinstance(number, bool) or not isinstance(number, int | float)):
            raise CheckpointError(f"`{path}` is damaged: `{name}` (={number!r}) must be a number; restore the file.")
    if not isinstance(machine, list) or not all(isinstance(line, str) for line in machine):
        raise CheckpointError(f"`{path}` is damaged: `machine` must be a list of lines; restore the file.")
    return summary


def _skeleton(model: str, num_classes: int) -> AbstractImageClassifier:
    with torch.device("meta"):
        return create_model(model, num_classes=num_classes)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _mebibytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**20:.1f}"
