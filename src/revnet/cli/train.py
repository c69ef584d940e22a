"""`revnet train`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from revnet.cli._errors import UsageError
from revnet.cli._options import takes_settings
from revnet.cli._photos import PHOTO_RECIPE, photo_settings
from revnet.cli._step_flags import open_folder, optional_picture
from revnet.training import LanguageConfig, NiceConfig, TrainConfig


@takes_settings(TrainConfig)
def train(*, resume: str | None = None, find_lr: bool = False, **settings: Any) -> None:
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
        revnet train --data path/to/images --weights runs/digits_revnet38_1 --freeze stem
        revnet train --resume runs/digits_revnet38_1

    Args:
        resume: Folder of an interrupted run, to continue after its last finished epoch with its own settings.
        find_lr: Suggest a learning rate, after 100 updates in which it rises, draw the losses, and exit.
        settings: Fields of `TrainConfig`.
    """
    check_resume(resume, settings)
    settings = {**_model_of_weights(settings), **settings}
    added = photo_settings(settings)
    config = TrainConfig(**settings, **added)
    if added:
        print(f"recipe {PHOTO_RECIPE}, for photographs; pass `--config` for another")
    run_training(config, resume, find_lr=find_lr)


def _model_of_weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model of the weights to start from, which is the default of a run with weights."""
    if settings.get("weights") is None or "model" in settings:
        return {}
    from revnet.training.classification.model import ClassifierHeader
    from revnet.training.starting import read_start_weights

    return {"model": read_start_weights(str(Path(settings["weights"]).expanduser()), ClassifierHeader).header.model}


def check_resume(resume: str | None, settings: Mapping[str, Any]) -> None:
    """Raise if settings are given together with `--resume`, because a run already has settings."""
    if resume is not None and settings:
        flag = "--" + next(iter(settings)).replace("_", "-")
        raise UsageError(f"`--resume` continues with the settings of the run; leave out `{flag}`.")


def run_training(
    config: TrainConfig | NiceConfig | LanguageConfig, resume: str | None, *, find_lr: bool = False
) -> None:
    """Train by `config`, or continue the run in the folder `resume`, and print its report.

    Args:
        config: The settings.
        resume: Folder of a run, or None.
        find_lr: Whether to suggest a learning rate instead.
    """
    from revnet import training  # PyTorch and Lightning load here, after the arguments are checked

    if find_lr:
        if resume is not None:
            raise UsageError("`--find-lr` is for a new run; leave out `--resume`.")
        trial = training.find_lr(config)
        picture = open_folder(config.out_dir) / "learning_rates.png"
        print(trial.report())
        with optional_picture():
            trial.plot(picture)
            print(f"picture {picture}")
        return
    result = training.train(config) if resume is None else training.resume(resume)
    print()
    print(result.report())
