"""`revnet train lm`."""

from typing import Any

from revnet.cli._errors import UsageError
from revnet.cli._options import takes_settings
from revnet.cli.train import check_resume, run_training
from revnet.training import LanguageConfig


@takes_settings(LanguageConfig)
def train_lm(*, resume: str | None = None, find_lr: bool = False, **settings: Any) -> None:
    """Train a reversible transformer as a character-level language model.

    Writes weights, log and learning curve to a new folder. `revnet generate` then continues texts with it.

    Examples:
        revnet train lm --data book.txt
        revnet train lm --config text/quick/lm --data book.txt --epochs 40
        revnet train lm --data book.txt --attention hierarchical --length 2048 --batch-size 2
        revnet train lm --resume runs/book_lm_1

    Args:
        resume: Folder of an interrupted run, to continue after its last finished epoch with its own settings.
        find_lr: Suggest a learning rate, after 100 updates in which it rises, draw the losses, and exit.
        settings: Fields of `LanguageConfig`.
    """
    check_resume(resume, settings)
    config = LanguageConfig(**settings)
    if resume is None and config.data is None:
        raise UsageError("`--data` is required: a text file, such as --data book.txt.")
    run_training(config, resume, find_lr=find_lr)
