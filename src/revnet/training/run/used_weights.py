"""The line that says which weights a command used: their file and, if the file says so, their epoch."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from revnet._input_files import name_in_utf8
from revnet._outside_text import shorten
from revnet.models.pretrained.hub_files import describe_download, is_hub_name
from revnet.models.pretrained.shipped import find_pretrained, packaged_name
from revnet.training.run.checkpoint import EPOCH_KEY, find_weights

_LONGEST_EPOCH = 20


def describe_weights(path: str | Path) -> str:
    """Return the file of weights and its epoch as text.

    Args:
        path: File of weights, the folder of a run, whose last weights are used, a name on the hub, or
            one of `list_pretrained()`.
    """
    folder = find_pretrained(path)
    name = folder.name if folder is not None else packaged_name(Path(path))
    if name is not None:
        return f"{name}, from the package"
    file = find_weights(Path(path)) if is_hub_name(path) or Path(path).is_dir() else Path(path)
    downloaded = describe_download(file)
    if downloaded is not None:
        return downloaded
    epoch = _epoch(file)
    return str(file) if epoch is None else f"{file} (epoch {shorten(epoch, _LONGEST_EPOCH)})"


def _epoch(file: Path) -> str | None:
    if file.suffix == ".ckpt":  # its name says the update
        return None
    try:
        with name_in_utf8(file) as name, safe_open(name, framework="pt") as weights:
            return (weights.metadata() or {}).get(EPOCH_KEY)
    except (OSError, SafetensorError):  # whoever reads the weights reports that
        return None
