"""The recipes that come with revnet: `configs/<dataset>/<recipe>/<model>.yaml`, by name."""

import difflib
from pathlib import Path

import revnet


def recipes_dir() -> Path:
    """Return the folder of the recipes, in the installed package or in the source checkout."""
    package = Path(revnet.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def list_recipes() -> list[str]:
    """Return the names of all recipes, such as `cifar10/paper/revnet38`, sorted."""
    folder = recipes_dir()
    return sorted(str(path.relative_to(folder).with_suffix("").as_posix()) for path in folder.glob("*/*/*.yaml"))


def find_recipe(name: str) -> Path:
    """Return the file of a recipe.

    Args:
        name: `<dataset>/<recipe>/<model>`, one of `list_recipes()`.

    Raises:
        ValueError: No recipe has that name.
    """
    names = list_recipes()
    if name not in names:
        same_model = [known for known in names if known.endswith(f"/{name}")]
        close = same_model or difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean `{close[0]}`? " if close else ""
        raise ValueError(f"`{name}` is neither a YAML file nor a recipe of revnet; {hint}`revnet recipes` lists them.")
    return recipes_dir() / f"{name}.yaml"
