"""`revnet train nice`."""

from typing import Any

from revnet.cli._options import takes_settings
from revnet.cli.train import run
from revnet.training import NiceConfig


@takes_settings(NiceConfig)
def train_nice(*, resume: str | None = None, find_lr: bool = False, **settings: Any) -> None:
    """Fit NICE, a density with exact likelihood, to images.

    Writes weights, log and learning curve to a new folder. `revnet sample` then draws images from it. By default it is
    fitted to handwritten digits, in about a minute on two cores.

    Examples:
        revnet train nice
        revnet train nice --config cifar10/quick/nice --data path/to/cifar-10-python.tar.gz
        revnet train nice --resume runs/digits_nice_1

    Args:
        resume: Folder of a run that was stopped, to continue it; `auto` starts a run in `--out-dir`, or continues the
            run there. Settings that are safe to change may be given with it.
        find_lr: Suggest a learning rate, after 100 updates in which it rises, draw the losses, and exit.
        settings: Fields of `NiceConfig`.
    """
    run(NiceConfig, settings, resume=resume, find_lr=find_lr)
