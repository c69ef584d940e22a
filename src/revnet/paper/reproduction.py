"""Train the networks of a table, one run per seed, and write the table whenever a run finishes."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from revnet._paths import expand_user
from revnet._result_files import make_results_folder
from revnet.paper.report import RunFigures, report_files, write_report
from revnet.paper.tables import Row, Table
from revnet.training import TrainConfig, TrainingInterrupted, resume, train
from revnet.training.recipes import find_recipe

_MAY_DIFFER = {"data", "device", "num_threads", "num_workers", "out_dir"}
"""Settings that may differ between runs of one table."""


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
    out_dir: str | Path,
    *,
    models: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    report_only: bool = False,
    quiet: bool = False,
    command: str = "revnet reproduce",
    **settings: Any,
) -> list[RunFigures]:
    """Train the missing runs of `table`, and write the results next to the paper's numbers.

    Each run has a separate folder, `<out_dir>/<model>_seed<seed>`, with the files of `revnet train`. Runs are
    independent, so a table can be split over machines with `models` and `seeds`, and the folders merged afterwards. An
    interrupted run continues from its newest checkpoint, and a finished run is kept.

    Args:
        table: One of `TABLES`.
        out_dir: Folder of the runs, `table.md`, `table.csv` and `table.png`.
        models: Rows to run. None means all rows.
        seeds: Seeds. Each model is trained once per seed.
        report_only: Whether to train nothing and write the table of the existing runs of all seeds.
        quiet: Whether to print nothing.
        command: Command line that the table prints.
        settings: Settings of `TrainConfig` that replace the recipe's, such as `data` for a local copy of the data set.

    Returns:
        The figures of all finished runs of the table in `out_dir`.

    Raises:
        ValueError: A model is not in the table, a seed is given twice, a setting does not exist, a run in `out_dir` has
            other settings, or the table would replace another file there.
        TrainingInterrupted: The process received Ctrl-C or SIGTERM. The same call continues the table.
    """
    out_dir = expand_user(out_dir)
    chosen = table.models if models is None else list(models)
    for model in chosen:
        if model not in table.models:
            raise ValueError(f"`models` (={model}) is not in the table {table.name}; it has {', '.join(table.models)}.")
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(
            f"`seeds` (={list(seeds)}) must be at least one number, all different; pass 0,1, for instance."
        )
    # Check all settings before the first run starts. Train one seed after the other, so that pairs finish early.
    chosen = [model for model in table.models if model in chosen]
    runs = [_plan(table, model, seed, out_dir, settings) for seed in seeds for model in chosen]
    for run in [] if report_only else runs:
        _check_same_settings(run)
    make_results_folder("out_dir", out_dir, report_files())
    for number, run in enumerate(runs, 1):
        if not (report_only or run.is_finished):
            if not quiet:
                name = f"{run.row.model}, seed {run.config.seed}"
                print(f"\n{table.name}, run {number} of {len(runs)}: {name}", flush=True)
            _train(run, quiet)
            write_report(table, out_dir, command)
    return write_report(table, out_dir, command)


def _plan(table: Table, model: str, seed: int, out_dir: Path, settings: dict[str, Any]) -> _Run:
    folder = out_dir / f"{model}_seed{seed}"
    config = TrainConfig.load(find_recipe(f"{table.recipe}/{model}"))
    unknown = sorted(set(settings) - {field.name for field in fields(TrainConfig)} | set(settings) & {"model", "seed"})
    if unknown:
        raise ValueError(f"`{unknown[0]}` cannot be set for a table; see `TrainConfig`.")
    config = replace(config, **settings, seed=seed, out_dir=str(folder))
    return _Run(next(row for row in table.rows if row.model == model), config, folder)


def _check_same_settings(run: _Run) -> None:
    """Raise an error if the folder holds a run with other settings."""
    path = run.folder / "config.yaml"
    if not path.is_file():
        return
    saved = TrainConfig.load(path, whole=True)
    for field in fields(TrainConfig):
        wanted, existing = getattr(run.config, field.name), getattr(saved, field.name)
        # A saved run has values for settings that were left open, and the number of epochs that `max_updates` takes.
        is_open = wanted is None or (field.name == "epochs" and run.config.max_updates is not None)
        if field.name not in _MAY_DIFFER and not is_open and wanted != existing:
            raise ValueError(
                f"`out_dir` (={str(run.folder.parent)!r}) holds a run of {run.row.model} with "
                f"{field.name} = {existing}, not {wanted}; pass another folder."
            )


def _train(run: _Run, quiet: bool) -> None:
    try:
        if (run.folder / "config.yaml").is_file():
            resume(run.folder, quiet=quiet)
        else:
            train(run.config, quiet=quiet)
    except TrainingInterrupted as stop:
        raise TrainingInterrupted("stopped; run the same command again to continue.", stop.signal_number) from stop
