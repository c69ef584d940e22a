"""The folder of a run, and the names of its files."""

import re
from itertools import count
from pathlib import Path

from revnet.training.settings.run_config import AbstractRunConfig

CONFIG = "config.yaml"
CHECKPOINT = "last.ckpt"
LAST_WEIGHTS = "last.safetensors"
BEST_WEIGHTS = "best.safetensors"
LOG = "metrics.csv"
PICTURE = "learning_curve.png"
SUMMARY = "summary.json"
PLAN = "plan.txt"
DRIFT = "drift.csv"
PROFILE = "profile.json"


def make_run_dir(config: AbstractRunConfig, data_name: str, model: str) -> Path:
    """Make the folder of a new run and write the settings to it; never touch the folder of another run.

    Args:
        config: The settings.
        data_name: Name of the data.
        model: Name of the model.

    Raises:
        ValueError: `out_dir` is not empty, or cannot be written.
    """
    try:
        folder = _next_free(data_name, model) if config.out_dir is None else _given(config.out_dir)
        config.save(folder / CONFIG)
    except OSError as error:
        out_dir = config.out_dir or "runs"
        raise ValueError(
            f"`out_dir` (={out_dir!r}) cannot be written: {error.strerror}; pass a folder that you can write to."
        ) from error
    return folder


def file_stem(data_name: str) -> str:
    """Return the name of a data set as a part of file names."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", data_name).strip("-.") or "data"


def _given(out_dir: str) -> Path:
    folder = Path(out_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(
            f"`out_dir` (={out_dir!r}) is not empty; pass a new folder, or continue the run in it with "
            f"`revnet train --resume {out_dir}`."
        )
    return folder


def _next_free(data_name: str, model: str) -> Path:
    stem = file_stem(data_name)
    for number in count(1):
        folder = Path("runs") / f"{stem}_{model}_{number}"
        try:
            folder.mkdir(parents=True)  # checking first would let two runs take the same folder
        except FileExistsError:
            continue
        return folder
    raise AssertionError  # `count` does not end
