"""`revnet train`."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from revnet._paths import expand_user
from revnet.cli._errors import UsageError
from revnet.cli._options import takes_settings
from revnet.cli._photos import PHOTO_RECIPE, photo_settings
from revnet.cli._step_flags import open_folder, optional_picture
from revnet.cli._streams import print_while_writing
from revnet.training import LanguageConfig, NiceConfig, TrainConfig
from revnet.training.processes.world import is_printing
from revnet.training.settings.run_config import read_task

_COMMANDS = {None: TrainConfig.command, "nice": NiceConfig.command, "lm": LanguageConfig.command}
"""Commands by the `task` in the settings of a run."""
_RATES = "learning_rates.png"
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
    run(_make_config, settings, task=None, resume=resume, find_lr=find_lr)


def _make_config(**settings: Any) -> TrainConfig:
    settings = {**_model_of_weights(settings), **settings}
    added = photo_settings(settings)
    config = TrainConfig(**settings, **added)
    if added and is_printing():
        print(f"recipe {PHOTO_RECIPE}, for photographs; pass `--config` for another")
    return config


def _model_of_weights(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the model of the weights to start from, which is the default of a run with weights."""
    if settings.get("weights") is None or "model" in settings:
        return {}
    from revnet.training.classification.model import ClassifierHeader
    from revnet.training.starting import read_start_weights

    return {"model": read_start_weights(str(expand_user(settings["weights"])), ClassifierHeader).header.model}


def run(
    make_config: Callable[..., TrainConfig | NiceConfig | LanguageConfig],
    settings: Mapping[str, Any],
    *,
    task: str | None,
    resume: str | None,
    find_lr: bool,
) -> None:
    """Start a run or continue one, and print its report; or only suggest a learning rate.

    Args:
        make_config: Function that makes the settings of a new run.
        settings: The settings that were given.
        task: The task of the command: `nice`, `lm`, or None for a classifier.
        resume: Folder of the run to continue; `auto` starts it if it does not exist, and None starts a run.
        find_lr: Whether to suggest a learning rate instead.
    """
    folder = _find_run(resume, settings)
    if folder is not None and find_lr:
        raise UsageError("`--find-lr` is for a new run; leave out `--resume`.")
    # `revnet train --resume FOLDER` continues a run of any task, as the line of a stopped run says.
    if folder is not None and (task is not None or resume == AUTO):
        _check_task(folder, task)
    config = make_config(**settings) if folder is None else None

    from revnet import training  # PyTorch and Lightning load here, after the arguments are checked

    if config is None:
        _report(training.resume(str(folder), **settings))
    elif find_lr:
        picture = open_folder(config.out_dir, _RATES) / _RATES
        _report_rate(training.find_lr(config), picture)
    else:
        _report(training.train(config))


def _find_run(resume: str | None, settings: Mapping[str, Any]) -> str | None:
    """Return the folder of the run to continue, or None to start one."""
    if resume != AUTO:
        return resume
    folder = settings.get("out_dir")
    if folder is None:
        raise UsageError("`--resume auto` needs a folder; pass `--out-dir FOLDER`.")
    # Without settings, the run in the folder was stopped before it began.
    folder = expand_user(folder)
    return str(folder) if (folder / "config.yaml").is_file() else None


def _check_task(folder: str, task: str | None) -> None:
    """Raise if a folder holds a run of another task."""
    path = Path(folder) / "config.yaml"
    if not path.is_file():
        return
    command = _COMMANDS.get(read_task(path))
    if command not in (None, _COMMANDS[task]):  # None is a task that `resume` refuses
        raise UsageError(
            f"`--resume` (={folder}) is a run of `{command}`, not of `{_COMMANDS[task]}`; continue it with "
            f"`{command} --resume {shlex.quote(folder)}`."
        )


def _report_rate(trial: Any, picture: Path) -> None:
    with print_while_writing() as print_line, optional_picture(picture.parent):
        print_line(trial.report())
        trial.plot(picture)
        print_line(f"picture {picture}")


def _report(result: Any) -> None:
    if is_printing():
        print()
        print(result.report())
