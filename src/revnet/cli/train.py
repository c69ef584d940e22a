"""`revnet train`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from revnet.cli._errors import UsageError
from revnet.cli._options import takes_settings
from revnet.cli._photos import PHOTO_RECIPE, photo_settings
from revnet.cli._step_flags import open_folder, optional_picture
from revnet.training import LanguageConfig, NiceConfig, TrainConfig
from revnet.training.processes.world import is_printing

AUTO = "auto"
"""Value of `--resume` that starts a run or continues it."""


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
        revnet train --resume auto --out-dir runs/digits

    Args:
        resume: Folder of a run that was stopped, to continue it; `auto` starts a run in `--out-dir`, or continues the
            run there. Settings that are safe to change may be given with it.
        find_lr: Suggest a learning rate, after 100 updates in which it rises, draw the losses, and exit.
        settings: Fields of `TrainConfig`.
    """
    folder = find_run(resume, settings)
    if folder is not None:
        check_find_lr(find_lr)
        continue_run(folder, settings)
        return
    settings = {**_model_of_weights(settings), **settings}
    added = photo_settings(settings)
    config = TrainConfig(**settings, **added)
    if added and is_printing():
        print(f"recipe {PHOTO_RECIPE}, for photographs; pass `--config` for another")
    start_run(config, find_lr=find_lr)


def _model_of_weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model of the weights to start from, which is the default of a run with weights."""
    if settings.get("weights") is None or "model" in settings:
        return {}
    from revnet.training.classification.model import ClassifierHeader
    from revnet.training.starting import read_start_weights

    return {"model": read_start_weights(str(Path(settings["weights"]).expanduser()), ClassifierHeader).header.model}


def find_run(resume: str | None, settings: Mapping[str, Any]) -> str | None:
    """Return the folder of the run to continue, or None to start one."""
    if resume != AUTO:
        return resume
    folder = settings.get("out_dir")
    if folder is None:
        raise UsageError("`--resume auto` needs a folder; pass `--out-dir FOLDER`.")
    # Without settings, the run in the folder was stopped before it began.
    return str(folder) if (Path(folder).expanduser() / "config.yaml").is_file() else None


def check_find_lr(find_lr: bool) -> None:
    """Raise if a learning rate is to be found for a run that has one."""
    if find_lr:
        raise UsageError("`--find-lr` is for a new run; leave out `--resume`.")


def start_run(config: TrainConfig | NiceConfig | LanguageConfig, *, find_lr: bool = False) -> None:
    """Train by `config`, and print the report; or only suggest a learning rate."""
    from revnet import training  # PyTorch and Lightning load here, after the arguments are checked

    if not find_lr:
        _report(training.train(config))
        return
    trial = training.find_lr(config)
    picture = open_folder(config.out_dir) / "learning_rates.png"
    print(trial.report())
    with optional_picture():
        trial.plot(picture)
        print(f"picture {picture}")


def continue_run(folder: str, settings: Mapping[str, Any]) -> None:
    """Continue the run in `folder` with the settings that were given, and print its report."""
    from revnet import training

    _report(training.resume(folder, **{name: value for name, value in settings.items() if name != "out_dir"}))


def _report(result: Any) -> None:
    if is_printing():
        print()
        print(result.report())
