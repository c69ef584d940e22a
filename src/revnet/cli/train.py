"""`revnet train`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from revnet.training import TrainConfig


def train(*, resume: str | None = None, **settings: Any) -> None:
    """Train a model, and leave weights, log and learning curve in a new folder.

    Without options it trains a small RevNet on hand-written digits, in about a minute on two cores. These are the
    options for classifiers; `revnet train nice --help` has those of densities of images, `revnet train lm --help` those
    of language models.

    Examples:
        revnet train
        revnet train --config cifar10/paper/revnet38
        revnet train --config cifar10/quick/revnet38 --data path/to/cifar-10-python.tar.gz
        revnet train --data path/to/images --model revnet56 --batch-size 64 --val-fraction 0.1
        revnet train nice --data digits
        revnet train lm --data book.txt
        revnet train --resume runs/digits_revnet38_1

    Args:
        resume: Folder of a run that was stopped: go on after its last finished epoch, with its own settings.
        settings: See `TrainConfig`.
    """
    config = TrainConfig(**settings)
    check_resume(resume, settings)

    from revnet import training  # PyTorch and Lightning load here, once the arguments are known to be good

    result = training.train(config) if resume is None else training.resume(resume)
    print()
    print(result.report())


def check_resume(resume: str | None, settings: Mapping[str, Any]) -> None:
    """Raise if there are settings beside the folder of a run, which has its own."""
    if resume is not None and settings:
        flag = "--" + next(iter(settings)).replace("_", "-")
        raise ValueError(f"`--resume` goes on with the run's own settings; leave out `{flag}`.")
