"""`revnet train`."""

from collections.abc import Mapping
from typing import Any

from revnet.cli._errors import UsageError
from revnet.cli._options import takes_settings
from revnet.cli._photos import PHOTO_RECIPE, photo_settings
from revnet.training import LanguageConfig, NiceConfig, TrainConfig
from revnet.training.processes.world import is_printing


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

    Args:
        resume: Folder of an interrupted run, to continue after its last finished epoch with its own settings.
        settings: Fields of `TrainConfig`.
    """
    check_resume(resume, settings)
    added = photo_settings(settings)
    config = TrainConfig(**settings, **added)
    if added and is_printing():
        print(f"recipe {PHOTO_RECIPE}, for photographs; pass `--config` for another")
    run_training(config, resume)


def check_resume(resume: str | None, settings: Mapping[str, Any]) -> None:
    """Raise if settings are given together with `--resume`, because a run already has settings."""
    if resume is not None and settings:
        flag = "--" + next(iter(settings)).replace("_", "-")
        raise UsageError(f"`--resume` continues with the settings of the run; leave out `{flag}`.")


def run_training(config: TrainConfig | NiceConfig | LanguageConfig, resume: str | None) -> None:
    """Train by `config`, or continue the run in the folder `resume`, and print its report."""
    from revnet import training  # PyTorch and Lightning load here, after the arguments are checked

    result = training.train(config) if resume is None else training.resume(resume)
    if is_printing():
        print()
        print(result.report())
