"""Write the gradient-angle study as a Markdown page, CSV files and a figure."""

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, fields
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from revnet._atomic_file import write_csv, write_text
from revnet._figure import check_matplotlib
from revnet._hardware import hardware_name
from revnet._provenance import Provenance, with_environment
from revnet._result_files import IsOwn, begins_with, is_picture, make_results_folder, writing_to
from revnet.paper.gradient_angle import draw
from revnet.paper.gradient_angle.callbacks import GradientAngle
from revnet.paper.gradient_angle.gradients import GradientError
from revnet.paper.gradient_angle.study import AngleStudy, check_twins, measure_gradient_angle
from revnet.training import TrainConfig
from revnet.training.device import find_device
from revnet.training.run import run_dir
from revnet.training.settings.fields import list_groups

_TITLE = "# Gradients of rebuilt and of stored activations"
_ALWAYS_SHOWN = ("data", "model", "epochs", "batch_size", "lr", "precision", "seed")


def run_gradient_angle(
    config: TrainConfig,
    folder: Path,
    command: str,
    *,
    every: int = 50,
    with_reference: bool = False,
    quiet: bool = False,
) -> Path:
    """Reproduce the paper's figure in `gradient-angle_<model>_<data>_<hardware>_<date>` as Markdown, CSV and PNG.

    With `exact`, the name begins with `gradient-angle-exact`. This trains two networks with the same settings and seed:
    one reversed, in which the gradients are compared, and one stored. The runs are saved in the folders that
    `revnet train` uses.

    Args:
        config: Settings of both runs.
        folder: Output folder. It is created if it does not exist. Earlier results are replaced.
        command: Command line that the page prints.
        every: Number of updates from one measurement to the next.
        with_reference: Whether to compare stored gradients with float64 too.
        quiet: Whether to print nothing.

    Returns:
        The path of the page.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        TypeError: `every` is not an integer.
        ValueError: The model is not reversible, `every` is not positive, a setting is not allowed here, or `folder`
            cannot be written, or holds another file with one of the names.
        DataError: The data set is missing or corrupt.
        TrainingInterrupted: The process received Ctrl-C or SIGTERM.
    """
    angle = GradientAngle(every, with_reference=with_reference)
    check_twins(config)
    check_matplotlib()
    make_results_folder("out_dir", folder, _files(_name(config, find_device(config.device))))
    return write_study(measure_gradient_angle(config, angle, quiet=quiet), folder, command)


def write_study(study: AngleStudy, folder: Path, command: str) -> Path:
    """Write the page, the tables and the figure, and return the path of the page."""
    name = _name(study.config, study.device)
    page, errors, curves, picture = (folder / file for file in _files(name))
    with writing_to("out_dir", folder):
        write_text(page, "\n".join(_page(study, command, name)).rstrip() + "\n")
        write_csv(errors, _error_rows(study))
        write_csv(curves, _curve_rows(study))
        draw.plot(study, picture)
    return page


def _name(config: TrainConfig, device: torch.device) -> str:
    figure = "gradient-angle-exact" if config.exact else "gradient-angle"
    data = run_dir.data_stem(Path(config.data).name)
    return f"{figure}_{config.model}_{data}_{hardware_name(device)}_{datetime.date.today()}"


def _files(name: str) -> dict[str, IsOwn]:
    """Return the names of the page, the two tables and the picture, and how each is recognized."""
    return {
        f"{name}.md": begins_with(_TITLE.encode()),
        f"{name}.csv": begins_with(b"update,group,"),
        f"{name}_curves.csv": begins_with(b"update,reversed_loss,"),
        f"{name}.png": is_picture,
    }


def _error_rows(study: AngleStudy) -> Iterator[Sequence[Any]]:
    yield "update", *(field.name for field in fields(GradientError))
    for update, errors in study.errors.items():
        for error in errors:
            yield update, *astuple(error)


def _curve_rows(study: AngleStudy) -> Iterator[Sequence[Any]]:
    runs = study.runs
    yield "update", *(f"{name}_loss" for name in runs), *(f"{name}_val_error" for name in runs)
    for index, losses in enumerate(zip(*(run.losses for run in runs.values()), strict=True)):
        # Losses are from before the update, validation errors from after it.
        yield index, *losses, *(run.val_errors.get(index + 1, "") for run in runs.values())


def _page(study: AngleStudy, command: str, name: str) -> Iterator[str]:
    result = study.reversed.result
    trained = Provenance.parse(result.machine)  # the number of threads too
    yield f"{_TITLE}: {study.config.model} on {result.test.data}"
    yield ""
    yield f"- Hardware: {trained.hardware}"
    yield f"- Versions: {trained.versions}"
    yield f"- Date: {trained.date}"
    yield f"- Command: `{with_environment(command)}`"
    yield f"- Settings of both runs: {_settings(study)}"
    yield f"- Runs: `{study.reversed.result.folder}`, `{study.stored.result.folder}` (its stored twin)"
    yield ""
    yield f"![{name}.png]({name}.png)"
    yield ""
    yield from _angle_section(study)
    yield from _curve_section(study)


def _settings(study: AngleStudy) -> str:
    defaults, values = asdict(TrainConfig()), asdict(study.config)
    values["lr"] = TrainConfig.load(study.reversed.result.folder / run_dir.CONFIG).lr  # the default of the data
    names = [name for group in list_groups(TrainConfig).values() for name in group]
    shown = {name: values[name] for name in names if values[name] != defaults[name] or name in _ALWAYS_SHOWN}
    return ", ".join(f"{key} {list(value) if isinstance(value, tuple) else value}" for key, value in shown.items())


def _angle_section(study: AngleStudy) -> Iterator[str]:
    has_reference = any(error.reference_angle_degrees is not None for error in study.errors[0])
    yield "## Angle between the two gradients, degrees; relative error"
    yield ""
    yield (
        f"Measured in the reversed run before {len(study.errors)} of its {len(study.reversed.losses):,} updates. The "
        "gradients are computed from rebuilt and from stored activations with the batch, weights and random numbers of "
        "the update, and each group of parameters is one vector. The forward pass is exact, so modules after the last "
        "reversible block have the same gradient."
    )
    if has_reference:
        yield "The reference compares the stored gradient with its value in float64: the rounding of plain autograd."
    yield ""
    columns = ["angle, first", "median", "largest", "last", "relative error, median", "largest"]
    columns += ["reference: angle, median", "largest"] * has_reference
    yield f"| | {' | '.join(columns)} |"
    yield f"| --- |{' ---: |' * len(columns)}"
    for group in study.groups:
        errors = list(study.errors_of(group).values())
        angles = [error.angle_degrees for error in errors]
        relative = [error.relative_error for error in errors]
        cells = [angles[0], median(angles), max(angles), angles[-1], median(relative), max(relative)]
        references = [error.reference_angle_degrees for error in errors if error.reference_angle_degrees is not None]
        cells += [median(references), max(references)] if references else []
        yield f"| {group} | {' | '.join(f'{cell:.1e}' if cell else '0' for cell in cells)} |"
    yield ""


def _curve_section(study: AngleStudy) -> Iterator[str]:
    runs = list(study.runs.values())
    yield "## The two runs"
    yield ""
    yield f"Both runs have the same settings and seed. {_first_difference(study)}"
    yield ""
    yield f"| | {' | '.join(study.runs)} |"
    yield "| --- | ---: | ---: |"
    num_last = max(1, len(study.reversed.losses) // 20)
    rows = {f"training loss, mean of the last {num_last}": [f"{fmean(run.losses[-num_last:]):.4g}" for run in runs]}
    if study.reversed.val_errors:
        rows["validation error after the last epoch"] = [
            f"{100 * list(run.val_errors.values())[-1]:.2f} %" for run in runs
        ]
    rows["test error, last weights"] = [
        f"{100 * run.result.test.error:.2f} % ({run.result.test.num_errors} of {run.result.test.num_images:,})"
        for run in runs
    ]
    for quantity, cells in rows.items():
        yield f"| {quantity} | {' | '.join(cells)} |"


def _first_difference(study: AngleStudy) -> str:
    pairs = zip(study.reversed.losses, study.stored.losses, strict=True)
    first = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    if first is None:
        return "The losses of all updates are equal, bit for bit."
    return (
        f"The losses are equal, bit for bit, up to update {first}; after it they differ by rounding, which training "
        "amplifies."
    )
