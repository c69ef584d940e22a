"""`revnet train nice`."""

from __future__ import annotations

from typing import Any

from revnet.cli.train import check_resume
from revnet.training import NiceConfig


def train_nice(*, resume: str | None = None, **settings: Any) -> None:
    """Fit NICE, a density with exact likelihood, to images; `revnet sample` then draws new ones.

    Leaves weights, log and learning curve in a new folder. Without options it fits hand-written digits, in about a
    minute on two cores.

    Examples:
        revnet train nice
        revnet train nice --config cifar10/quick/nice --data path/to/cifar-10-python.tar.gz
        revnet train nice --resume runs/digits_nice_1

    Args:
        resume: Folder of a run that was stopped: go on after its last finished epoch, with its own settings.
        settings: See `NiceConfig`.
    """
    config = NiceConfig(**settings)
    check_resume(resume, settings)

    from revnet import training  # PyTorch and Lightning load here, once the arguments are known to be good

    result = training.train(config) if resume is None else training.resume(resume)
    print()
    print(result.report())
