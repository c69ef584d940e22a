"""Settings for photographs: the defaults of `TrainConfig` suit digits of 8x8 pixels."""

from collections.abc import Mapping
from typing import Any

from revnet._image_files import is_plain_folder
from revnet._paths import expand_user
from revnet.training import TrainConfig
from revnet.training.recipes import find_recipe

PHOTO_RECIPE = "photos/quick/revnet56"


def photo_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that the recipe for photographs adds to `settings`; none if the data are not photographs."""
    if not _are_photographs(settings.get("data", TrainConfig.data)):
        return {}
    recipe = vars(TrainConfig.load(find_recipe(PHOTO_RECIPE)))
    # Options of the recipe's optimizer do not fit every other one.
    left_out = {"data", *settings, *(("momentum", "nesterov") if "optimizer" in settings else ())}
    if "batch_size" in settings or "optimizer" in settings:
        left_out.add("lr")  # the default follows both
    if "weights" in settings:
        left_out.add("preprocess")  # the weights have theirs
    return {name: value for name, value in recipe.items() if name not in left_out}


def _are_photographs(data: str) -> bool:
    """Return whether `data` names image files of many sizes, in folders or on the Hugging Face hub."""
    if data == "imagenet" or data.startswith("hub:"):
        return True
    folder = expand_user(data)
    return (folder / "train").is_dir() or is_plain_folder(folder)
