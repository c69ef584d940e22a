"""`revnet train nice`."""

from typing import Any

from revnet.cli._options import takes_settings
from revnet.cli.train import run
from revnet.training import NiceConfig
from revnet.training.recipes import find_recipe

_RECIPES = {"glow": "digits/quick/glow", "realnvp": "digits/quick/realnvp"}
"""Recipe whose settings are the defaults of a model."""


@takes_settings(NiceConfig)
def train_nice(*, resume: str | None = None, find_lr: bool = False, **settings: Any) -> None:
    """Fit NICE, RealNVP or Glow, densities with exact likelihood, to images.

    Writes weights, log and learning curve to a new folder. `revnet sample` then draws images from it, and `revnet
    score` computes the likelihood of image files. By default NICE is fitted to handwritten digits, in about a minute on
    two cores. `--model realnvp` and `--model glow` take the other defaults from their recipes for digits.

    Examples:
        revnet train nice
        revnet train nice --model glow
        revnet train nice --config cifar10/quick/glow --data path/to/cifar-10-python.tar.gz
        revnet train nice --model glow --data path/to/photos --image-size 32
        revnet train nice --resume runs/digits_nice_1

    Args:
        resume: Folder of a run that was stopped, to continue it; `auto` starts a run in `--out-dir`, or continues the
            run there. Settings that are safe to change may be given with it.
        find_lr: Suggest a learning rate, after 100 updates in which it rises, draw the losses, and exit.
        settings: Fields of `NiceConfig`.
    """
    run(_make_config, settings, task="nice", resume=resume, find_lr=find_lr)


def _make_config(**settings: Any) -> NiceConfig:
    recipe = _RECIPES.get(settings.get("model", NiceConfig.model))
    defaults = {} if recipe is None else vars(NiceConfig.load(find_recipe(recipe)))
    return NiceConfig(**{**defaults, **settings})
