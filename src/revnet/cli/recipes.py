"""`revnet recipes`."""

import shutil

from revnet._text_table import aligned
from revnet.training.recipes import find_recipe, list_recipes

_COMMANDS = {None: "train", "nice": "train nice", "lm": "train lm"}


_YOUR_DATA = {"photos": "your photos", "text": "your text"}
"""Data of the recipes that need a path, by the first part of their names."""


def recipes() -> None:
    """List the recipes, each with its command, model, data and number of epochs.

    A recipe is a file of settings that comes with revnet. Pass its name to `--config` of the command in the table, and
    other options to change single settings. For "your photos" and "your text", also pass the path with `--data`.

    Examples:
        revnet recipes
        revnet train --config cifar10/quick/revnet38 --epochs 5
    """
    import yaml

    rows = [("recipe", "command", "model", "data", "epochs")]
    for name in list_recipes():
        settings = yaml.safe_load(find_recipe(name).read_text(encoding="utf-8"))
        task = settings.get("task")
        model, data = settings.get("model", task), _YOUR_DATA.get(name.partition("/")[0], settings["data"])
        rows.append((name, _COMMANDS[task], model, data, str(settings["epochs"])))
    columns = shutil.get_terminal_size().columns
    num_columns = 5
    while len(max(lines := aligned([row[:num_columns] for row in rows], 4), key=len)) > columns and num_columns > 1:
        num_columns -= 1  # the name of a recipe says most of the rest
    print("\n".join(lines))
