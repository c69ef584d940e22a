"""Train the networks of a table, one run for each seed, and write the table whenever one has finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from revnet.paper.report import RunFigures, write_report
from revnet.paper.tables import Row, Table
from revnet.training import TrainConfig, TrainingInterrupted, resume, train
from revnet.training.recipes import find_recipe

_MAY_DIFFER = {"data", "device", "num_threads", "num_workers", "out_dir"}
"""Settings that say where a run was made, not which."""


@dataclass(frozen=True)
class _Run:
    row: Row
    config: TrainConfig
    folder: Path

    @property
    def is_finished(self) -> bool:
        return (self.folder / "summary.json").is_file()


def reproduce(
    table: Table,
    output_dir: str | Path,
    *,
    models: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    report_only: bool = False,
    quiet: bool = False,
    command: str = "revnet reproduce",
    **settings: Any,
) -> list[RunFigures]:
    """Make the runs of `table` that are not there yet, and write the table beside the paper's numbers.

    Each run has a folder of its own, `<output_dir>/<model>_seed<seed>`, as `revnet train` leaves it, and shares nothing
    with the others but the code. So a table may be spread over machines (`models`, `seeds`), and the folders put
    together afterwards. A run that was stopped goes on after its last finished epoch; one that has finished is kept.

    Args:
        table: One of `TABLES`.
        output_dir: Where the runs are, and `table.md` and `table.csv`.
        models: The rows to run; all of the table if None.
        seeds: A run for each.
        report_only: Make no runs; write the table of those that are there, of any seed.
        quiet: Print nothing.
        command: What the table says it was made by.
        settings: Settings that replace the recipe's, see `TrainConfig`; `data` for a copy of the data set at hand.

    Returns:
        The figures of all finished runs of the table in `output_dir`.

    Raises:
        ValueError: A model is not in the table, a seed is given twice, a setting does not exist, or a run in
            `output_dir` was made with other settings.
        TrainingInterrupted: Ctrl-C or SIGTERM came; the same call goes on.
    """
    output_dir = Path(output_dir).expanduser()
    chosen = table.models if models is None else list(models)
    for model in chosen:
        if model not in table.models:
            raise ValueError(f"`models` (={model}) is not in the table {table.name}; it has {', '.join(table.models)}.")
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(f"`seeds` (={list(seeds)}) must be different numbers, at least one; pass 0,1, for instance.")
    # All settings are checked before the first run starts; runs of a seed follow each other, so that pairs come early.
    chosen = [model for model in table.models if model in chosen]
    runs = [_plan(table, model, seed, output_dir, settings) for seed in seeds for model in chosen]
    for run in [] if report_only else runs:
        _check_same_settings(run)
    for number, run in enumerate(runs, 1):
        if not (report_only or run.is_finished):
            if not quiet:
                name = f"{run.row.model}, seed {run.config.seed}"
                print(f"\n{table.name}, run {number} of {len(runs)}: {name}", flush=True)
            _make(run, quiet)
            write_report(table, output_dir, command)
    return write_report(table, output_dir, command)


def _plan(table: Table, model: str, seed: int, output_dir: Path, settings: dict[str, Any]) -> _Run:
    folder = output_dir / f"{model}_seed{seed}"
    config = TrainConfig.load(find_recipe(f"{table.recipe}/{model}"))
    unknown = sorted(set(settings) - {field.name for field in fields(TrainConfig)} | set(settings) & {"model", "seed"})
    if unknown:
        raise ValueError(f"`{unknown[0]}` is no setting that a table leaves open; see `TrainConfig`.")
    config = replace(config, **settings, seed=seed, out_dir=str(folder))
    return _Run(next(row for row in table.rows if row.model == model), config, folder)


def _check_same_settings(run: _Run) -> None:
    """Refuse to mix runs of other settings into a table."""
    path = run.folder / "config.yaml"
    if not path.is_file():
        return
    found = TrainConfig.load(path)
    for field in fields(TrainConfig):
        wanted, there = getattr(run.config, field.name), getattr(found, field.name)
        # What was left open has been filled in; a run with `max_updates` has noted the epochs that they take.
        is_open = wanted is None or (field.name == "epochs" and run.config.max_updates is not None)
        if field.name not in _MAY_DIFFER and not is_open and wanted != there:
            raise ValueError(
                f"`output_dir` (={str(run.folder.parent)!r}) holds a run of {run.row.model} with "
                f"{field.name} = {there}, not {wanted}; pass another folder."
            )


def _make(run: _Run, quiet: bool) -> None:
    try:
        if (run.folder / "last.ckpt").is_file():
            resume(run.folder, quiet=quiet)
            return
        (run.folder / "config.yaml").unlink(missing_ok=True)  # all that a run leaves that finished no epoch
        train(run.config, quiet=quiet)
    except TrainingInterrupted as stop:
        raise TrainingInterrupted("stopped; the same command goes on.", stop.signal_number) from stop
