"""The folder of a run, and the names of its files."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from revnet._outside_text import file_stem
from revnet._paths import expand_user
from revnet.training.settings.run_config import AbstractRunConfig

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
DATA = "data.json"
LAST_WEIGHTS = "last.safetensors"
BEST_WEIGHTS = "best.safetensors"
LOG = "metrics.csv"
UPDATE_LOG = "updates.csv"
LOGGERS = "loggers.json"
PICTURE = "learning_curve.png"
SUMMARY = "summary.json"
PLAN = "plan.txt"
DRIFT = "drift.csv"
PROFILE = "profile.json"
TOKENIZER = "tokenizer.json"
FILES = (
    CONFIG,
    DATA,
    LAST_WEIGHTS,
    BEST_WEIGHTS,
    LOG,
    UPDATE_LOG,
    LOGGERS,
    PICTURE,
    SUMMARY,
    PLAN,
    DRIFT,
    PROFILE,
    TOKENIZER,
)
"""Names of the files that a run writes."""
SHARDS_EXTRA = "meta.pt"
"""File of a checkpoint in shards in which Lightning keeps everything but tensors of the model and the optimizer."""


def is_sharded(path: Path) -> bool:
    """Return whether the folder at `path` is a checkpoint in shards."""
    return (path / SHARDS_EXTRA).is_file()


def make_run_dir(config: AbstractRunConfig, data_name: str, model: str) -> Path:
    """Make the folder of a new run; never touch the folder of another run.

    Args:
        config: The settings.
        data_name: Name of the data.
        model: Name of the model.

    Raises:
        ValueError: `out_dir` is not empty, or cannot be written.
    """
    with _write_errors(config):
        folder = _next_free(data_name, model) if config.out_dir is None else _given(config.out_dir)
        (folder / CHECKPOINTS).mkdir(exist_ok=True)
    return folder


def write_settings(config: AbstractRunConfig, folder: Path) -> None:
    """Write the settings to the folder of a new run, which is a run from then on.

    Raises:
        ValueError: Another run has taken the folder, or it cannot be written.
    """
    if (folder / CONFIG).exists():
        raise _not_empty(str(folder))
    with _write_errors(config):
        config.save(folder / CONFIG)


@contextmanager
def _write_errors(config: AbstractRunConfig) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        out_dir = config.out_dir or "runs"
        raise ValueError(
            f"`out_dir` (={out_dir!r}) cannot be written: {error.strerror}; pass a folder that you can write to."
        ) from error


def data_stem(data_name: str) -> str:
    """Return the name of a data set as a part of file names."""
    return file_stem(data_name) or "data"


def _given(out_dir: str) -> Path:
    folder = expand_user(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if any(path.name != CHECKPOINTS for path in folder.iterdir()) or any(folder.glob(f"{CHECKPOINTS}/*.ckpt")):
        raise _not_empty(out_dir)
    return folder


def _not_empty(out_dir: str) -> ValueError:
    return ValueError(
        f"`out_dir` (={out_dir!r}) is not empty; pass a new folder, or continue the run in it with "
        f"`revnet train --resume {out_dir}`."
    )


def _next_free(data_name: str, model: str) -> Path:
    stem = data_stem(data_name)
    for number in count(1):
        folder = Path("runs") / f"{stem}_{model}_{number}"
        try:
            folder.mkdir(parents=True)  # checking first would let two runs take the same folder
        except FileExistsError:
            continue
        return folder
    raise AssertionError  # `count` does not end
