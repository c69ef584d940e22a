"""Trained networks that come with the package, or stand in a folder of the user, by name.

A network is a folder in the layout of the Hugging Face hub: `config.json`, `model.safetensors` and `README.md`, the
model card. Its name is the name of the folder: the model and, after a dot, what it was trained on: "revnet38.digits".
"""

import difflib
import os
from pathlib import Path

from revnet._checks import describe
from revnet._paths import expand_user
from revnet.models.pretrained.hub_files import CONFIG, SNAPSHOTS, WEIGHTS, is_hub_name

VARIABLE = "REVNET_WEIGHTS"
"""Environment variable with a folder of additional networks, which come before the networks in the package."""
SAMPLE = "sample.png"
"""An image to classify, next to the weights of a classifier."""
_PACKAGED = Path(__file__).parent.parent / "weights"
_PUBLISHED = ("cifar10", "imagenet")
"""Data for which networks were published: what a model without a name of data was trained on."""


def list_pretrained() -> list[str]:
    """Return the names of the trained networks that `create_model(name, pretrained=True)` and the commands know.

    Raises:
        ValueError: The environment variable `REVNET_WEIGHTS` is set, but not to the path of a folder.

    Example:
        >>> from revnet.models import list_pretrained
        >>> "revnet38.digits" in list_pretrained()
        True
    """
    return sorted({path.name for folder in _folders() for path in folder.iterdir() if _is_net(path)})


def find_pretrained(name: str | os.PathLike[str]) -> Path | None:
    """Return the folder of a trained network, or None if no network has this name.

    A path that exists is not a name.
    """
    text = os.fspath(name)
    if not text or "/" in text or os.sep in text or Path(text).exists():
        return None
    return next((folder / text for folder in _folders() if _is_net(folder / text)), None)


def packaged_name(file: Path) -> str | None:
    """Return the name of the trained network that comes with the package and that a file of weights belongs to."""
    return file.parent.name if file.parent.parent == _PACKAGED else None


def closest_names(name: str) -> list[str]:
    """Return the name of the trained network that is most like `name`; empty if none is much like it."""
    return difflib.get_close_matches(name, list_pretrained(), n=1)


def trained_folder(name: str) -> Path:
    """Return the folder of the trained network of a model.

    Args:
        name: The name of a trained network, or of a model that was trained on the data for which it was published.

    Raises:
        ValueError: There is none.
    """
    names = list_pretrained()
    for full in (name, *[f"{name}.{data}" for data in _PUBLISHED]):
        if full in names and (folder := find_pretrained(full)) is not None:
            return folder
    if isinstance(name, str) and (is_hub_name(name) or "/" in name):
        raise ValueError(
            f"`name` (={describe(name)}) must be the name of a network of this package if `pretrained` is True; for a "
            "folder, or a network on the Hugging Face hub, call `revnet.models.from_pretrained` with its name."
        )
    own = [full for full in names if full.startswith(f"{name}.")] or closest_names(str(name))
    hint = f"pass {' or '.join(map(repr, own))}, or one of" if own else "pass one of"
    raise ValueError(
        f"`pretrained` (=True) needs trained weights, but this package has none for `name` (={describe(name)}); {hint} "
        f"{', '.join(names) or 'none'}; or put a folder of this name into the folder that {VARIABLE} names."
    )


def results_folder(weights: Path) -> Path:
    """Return the folder for results about weights: theirs or, for downloaded and packaged ones, the current folder."""
    is_foreign = weights.parent.parent.name == SNAPSHOTS or weights.parent.parent == _PACKAGED
    return Path() if is_foreign else weights.parent


def _folders() -> list[Path]:
    own = os.environ.get(VARIABLE)
    if not own:
        return [_PACKAGED]
    folder = expand_user(own)
    if not folder.is_dir():
        raise ValueError(
            f"the environment variable `{VARIABLE}` must name a folder with trained networks, but `{own}` is not a "
            "folder; correct it, or unset it to have only the networks of the package."
        )
    return [folder, _PACKAGED]


def _is_net(path: Path) -> bool:
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()
