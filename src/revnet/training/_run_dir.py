"""The folder of a run."""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path

from revnet.training._settings import RunSettings

CONFIG = "config.yaml"
CHECKPOINT = "last.ckpt"
LAST_WEIGHTS = "last.safetensors"
BEST_WEIGHTS = "best.safetensors"
LOG = "metrics.csv"
PICTURE = "learning_curve.png"
SUMMARY = "summary.json"
PLAN = "plan.txt"
DRIFT = "drift.csv"


def make_run_dir(config: RunSettings, data_name: str, model: str) -> Path:
    """Make a folder for a new run and put the settings there; a run that exists is never touched.

    Args:
        config: The settings.
        data_name: How the data are called.
        model: How the model is called.

    Raises:
        ValueError: `out_dir` is taken, or cannot be written.
    """
    try:
        folder = _next_free(data_name, model) if config.out_dir is None else _given(config.out_dir)
        config.save(folder / CONFIG)
    except OSError as error:
        place = config.out_dir or "runs"
        raise ValueError(
            f"`out_dir` (={place!r}) cannot be written: {error.strerror}; pass a folder that you can write to."
        ) from error
    return folder


def file_stem(data_name: str) -> str:
    """The name of a data set as a part of file names."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", data_name).strip("-.") or "data"


def _given(out_dir: str) -> Path:
    folder = Path(out_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(
            f"`out_dir` (={out_dir!r}) is not empty; pass a new folder, or go on with the run in it by "
            f"`revnet train --resume {out_dir}`."
        )
    return folder


def _next_free(data_name: str, model: str) -> Path:
    stem = file_stem(data_name)
    for number in count(1):
        folder = Path("runs") / f"{stem}_{model}_{number}"
        try:
            folder.mkdir(parents=True)  # looking first would let two runs take the same folder
        except FileExistsError:
            continue
        return folder
    raise AssertionError  # `count` does not end
