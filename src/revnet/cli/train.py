"""`revnet train`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from revnet.cli._errors import UsageError
from revnet.cli._options import takes_settings
from revnet.cli._photos import PHOTO_RECIPE, photo_settings
from revnet.training import LanguageConfig, NiceConfig, TrainConfig
from revnet.training.processes.world import is_printing

AUTO = "auto"
"""Value of `--resume` that starts a run or continues it."""


@takes_settings(TrainConfig)
def train(*, resume: str | None = None, **settings: Any) -> None:
    """Train a classifier, and write weights, log and learning curve to a new folder.

    By default it trains a small RevNet on handwritten digits, in about a minute on two cores. Photographs, in folders
    or from the Hugging Face hub, take the defaults of the recipe photos/quick/revnet56 instead.

    These are the options for classifiers. For densities of images see `revnet train nice --help`, for language models
    `revnet train lm --help`.

    Examples:
        revnet train
        revnet train --data path/to/images --model revnet56
        revnet train --config cifar10/paper/revnet38
        revnet train --config cifar10/quick/revnet38 --data path/to/cifar-10-python.tar.gz
        revnet train nice --data digits
        revnet train lm --data book.txt
        revnet train --resume runs/digits_revnet38_1
        revnet train --resume auto --out-dir runs/digits

    Args:
        resume: Folder of a run that was stopped, to continue it; `auto` starts a run in `--out-dir`, or continues the
            run there. Settings that are safe to change may be given with it.
        settings: Fields of `TrainConfig`.
    """
    folder = find_run(resume, settings)
    if folder is not None:
        continue_run(folder, settings)
        return
    added = photo_settings(settings)
    config = TrainConfig(**settings, **added)
    if added and is_printing():
        print(f"recipe {PHOTO_RECIPE}, for photographs; pass `--config` for another")
    start_run(config)


def find_run(resume: str | None, settings: Mapping[str, Any]) -> str | None:
    """Return the folder of the run to continue, or None to start one."""
    if resume != AUTO:
        return resume
    folder = settings.get("out_dir")
    if folder is None:
        raise UsageError("`--resume auto` needs a folder; pass `--out-dir FOLDER`.")
    # Without settings, the run in the folder was stopped before it began.
    return str(folder) if (Path(folder).expanduser() / "config.yaml").is_file() else None


def start_run(config: TrainConfig | NiceConfig | LanguageConfig) -> None:
    """Train by `config`, and print the report."""
    from revnet import training  # PyTorch and Lightning load here, after the arguments are checked

    _report(training.train(config))


def continue_run(folder: str, settings: Mapping[str, Any]) -> None:
    """Continue the run in `folder` with the settings that were given, and print its report."""
    from revnet import training

    _report(training.resume(folder, **{name: value for name, value in settings.items() if name != "out_dir"}))


def _report(result: Any) -> None:
    if is_printing():
        print()
        print(result.report())
