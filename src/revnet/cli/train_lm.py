"""`revnet train lm`."""

from __future__ import annotations

from typing import Any

from revnet.cli.train import check_resume
from revnet.training import LanguageConfig


def train_lm(*, resume: str | None = None, **settings: Any) -> None:
    """Train a reversible transformer to continue text; `revnet generate` then writes some.

    Leaves weights, log and learning curve in a new folder.

    Examples:
        revnet train lm --data book.txt
        revnet train lm --config text/quick/lm --data book.txt --epochs 40
        revnet train lm --data book.txt --attention hierarchical --length 2048 --batch-size 2
        revnet train lm --resume runs/book_lm_1

    Args:
        resume: Folder of a run that was stopped: go on after its last finished epoch, with its own settings.
        settings: See `LanguageConfig`.
    """
    config = LanguageConfig(**settings)
    check_resume(resume, settings)
    if resume is None and config.data is None:
        raise ValueError("`--data` is needed: a text file, such as --data book.txt.")

    from revnet import training  # PyTorch and Lightning load here, once the arguments are known to be good

    result = training.train(config) if resume is None else training.resume(resume)
    print()
    print(result.report())
