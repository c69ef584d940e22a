"""The line that says which weights a command used: their file and, if the file says so, their epoch."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from revnet.training.run.checkpoint import EPOCH_KEY, find_weights


def describe_weights(path: str | Path) -> str:
    """Return the file of weights and its epoch as text.

    Args:
        path: File of weights, or the folder of a run, whose last weights are used.
    """
    file = find_weights(Path(path)) if Path(path).is_dir() else Path(path)
    epoch = _epoch(file)
    return str(file) if epoch is None else f"{file} (epoch {epoch})"


def _epoch(file: Path) -> str | None:
    if file.suffix == ".ckpt":  # its name says the update
        return None
    try:
        with safe_open(file, framework="pt") as weights:
            return (weights.metadata() or {}).get(EPOCH_KEY)
    except (OSError, SafetensorError):  # whoever reads the weights reports that
        return None
