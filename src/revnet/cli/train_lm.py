"""`revnet train lm`."""

from typing import Any

from revnet.cli._errors import UsageError
from revnet.cli._options import takes_settings
from revnet.cli.train import run
from revnet.training import LanguageConfig


@takes_settings(LanguageConfig)
def train_lm(*, resume: str | None = None, find_lr: bool = False, **settings: Any) -> None:
    """Train a reversible transformer as a language model.

    Writes weights, log and learning curve to a new folder. `revnet generate` then continues texts with it.

    Examples:
        revnet train lm --data book.txt
        revnet train lm --config text/quick/lm --data book.txt --epochs 40
        revnet train lm --data articles.jsonl --tokenizer bpe --vocab-size 8000
        revnet train lm --data book.txt --attention hierarchical --length 2048 --batch-size 2
        revnet train lm --resume runs/book_lm_1

    Args:
        resume: Folder of a run that was stopped, to continue it; `auto` starts a run in `--out-dir`, or continues the
            run there. Settings that are safe to change may be given with it.
        find_lr: Suggest a learning rate, after 100 updates in which it rises, draw the losses, and exit.
        settings: Fields of `LanguageConfig`.
    """
    run(_make_config, settings, task="lm", resume=resume, find_lr=find_lr)


def _make_config(**settings: Any) -> LanguageConfig:
    config = LanguageConfig(**settings)
    if config.data is None:
        raise UsageError("`--data` is required: a text file, such as --data book.txt.")
    return config
