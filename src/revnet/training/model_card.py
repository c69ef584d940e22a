"""The model card of a run, written from the files of the run: what they do not hold is left out."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from revnet._documents import read_json, read_yaml
from revnet._input_files import read_text
from revnet._outside_text import printable, shorten
from revnet._paths import expand_user
from revnet._units import counted, format_loss, format_seconds
from revnet.errors import CheckpointError
from revnet.memory import format_bytes
from revnet.models.pretrained.card import describe_class, format_card, how_to_load
from revnet.training.language.model import LanguageModel
from revnet.training.run import run_dir
from revnet.training.saved_module import SavedModule

_MOST_DRIFT_BYTES = 2**28
_LOCAL = frozenset({"out_dir", "data", "device", "num_workers", "num_threads", "logger"})
"""Settings that say where a run is, not what it does."""
_LONGEST_LABEL = 40
_MOST_LABELS = 100
_USE = {
    "classifier": (
        "from revnet.training import Classifier",
        "",
        'classifier = Classifier.from_pretrained("NAME")',
        "logits = classifier(images)  # (B, C, H, W), uint8",
        "classifier.header.class_names  # names of the logits",
    ),
    "nice": (
        "from revnet.training import ImageDensity",
        "",
        'density = ImageDensity.from_pretrained("NAME")',
        "bits_per_dim = density(images)  # (B, C, H, W), uint8",
        "samples = density.sample(16)",
    ),
    "lm": (
        "from revnet.training import LanguageModel",
        "",
        'language_model = LanguageModel.from_pretrained("NAME")',
        'language_model.generate("the start of a text", 100)',
    ),
}
_COMMANDS = {
    "classifier": "revnet predict hub:NAME photo.jpg\nrevnet evaluate hub:NAMEDATA",
    "nice": "revnet sample hub:NAME",
    "lm": "revnet generate hub:NAME",
}
_SCORES = {
    "test_accuracy": ("test accuracy", "last", "share"),
    "best_test_accuracy": ("test accuracy", "best", "share"),
    "best_val_accuracy": ("validation accuracy", "best", "share"),
    "test_bits_per_dim": ("test bits/dim", "last", "loss"),
    "best_test_bits_per_dim": ("test bits/dim", "best", "loss"),
    "best_val_bits_per_dim": ("validation bits/dim", "best", "loss"),
    "val_loss": ("validation loss, nats/TOKEN", "last", "loss"),
    "val_bits_per_byte": ("validation bits/byte", "last", "loss"),
    "best_val_loss": ("validation loss, nats/TOKEN", "best", "loss"),
    "best_val_bits_per_byte": ("validation bits/byte", "best", "loss"),
}
"""Names of the scores in the summary of a run, with the weights that they belong to."""


def write_card(module: SavedModule, weights: Path, name: str, *, epoch: str | None) -> str:
    """Return the text of a model card.

    Args:
        module: The module of the run.
        weights: File of its weights, in the folder of the run.
        name: Name of the model on the hub.
        epoch: Epoch of the weights, as their file says it; None if it does not.

    Raises:
        CheckpointError: A file of the run is damaged.
    """
    folder, kind = weights.parent, module.header.kind
    summary = read_json(folder / run_dir.SUMMARY) if (folder / run_dir.SUMMARY).is_file() else {}
    which = _which_weights(summary, weights, epoch)
    num_parameters = sum(parameter.numel() for parameter in module.model.parameters())
    network: Any = module.model
    sections = [
        describe_class(type(network).__name__, num_parameters),
        _data(module, epoch),
        how_to_load(name, _USE[kind]),
        f"```bash\n{_commands(module, name)}\n```",
        _files(kind),
        _results(summary, which),
        _memory(summary),
        _drift(folder / run_dir.DRIFT),
        _recipe(folder / run_dir.CONFIG, summary),
        _environment(summary),
    ]
    return format_card(network._card_task, name, sections)


def _commands(module: SavedModule, name: str) -> str:
    # Data that only the author has must be passed.
    data = " --data path/to/data" if Path(module.header.data).is_absolute() else ""
    return _COMMANDS[module.header.kind].replace("DATA", data).replace("NAME", name)


def _which_weights(summary: Mapping[str, Any], weights: Path, epoch: str | None) -> str | None:
    """Return whether the weights are the last or the best of the run that the summary is about; None if neither."""
    for which, file in (("last", run_dir.LAST_WEIGHTS), ("best", run_dir.BEST_WEIGHTS)):
        if weights.name == file and epoch is not None and str(summary.get(f"{which}_epoch")) == epoch:
            return which
    return None


def _data(module: SavedModule, epoch: str | None) -> str:
    header = module.header
    data = Path(header.data).name if Path(header.data).is_absolute() else header.data
    sentences = [f"It was trained by `revnet train` on `{shorten(data)}`"]
    if epoch is not None:
        sentences[0] += f"; these are the weights after epoch {shorten(epoch, 20)}"
    if hasattr(header, "image_shape"):
        channels, height, width = header.image_shape
        sentences.append(f"Images: {counted(channels, 'channel')}, {height}x{width} pixels")
    if hasattr(header, "class_names"):
        names = [shorten(label, _LONGEST_LABEL) for label in header.class_names]
        shown = ", ".join(names[:_MOST_LABELS]) + (", ..." if len(names) > _MOST_LABELS else "")
        sentences.append(f"{counted(len(names), 'class', 'classes')}: {shown}")
    if isinstance(module, LanguageModel):
        vocabulary = module.vocabulary
        sentences.append(f"Vocabulary: {counted(len(vocabulary), vocabulary.noun)}")
    return ". ".join(sentences) + "."


def _files(kind: str) -> str:
    text = "`config.json` holds the arguments of the network, and `model.safetensors` its weights."
    if kind == "classifier":
        text += (
            " `preprocess.safetensors` holds `preprocess.mean` and `preprocess.scale` in gray levels: the network "
            "takes `(pixels - mean) / scale`."
        )
    return text


def _results(summary: Mapping[str, Any], which: str | None) -> str:
    token = "token" if "val_tokens" in summary else "character"
    rows = [
        f"| {title.replace('TOKEN', token)} | {_format_score(summary[key], form)} |"
        for key, (title, of, form) in _SCORES.items()
        if of == which and _is_number(summary.get(key))
    ]
    if not rows:
        return ""
    counts = {"test_images": "test images", "val_characters": "characters of validation"}
    counts["val_tokens"] = "tokens of validation"
    notes = [f"{summary[key]:,} {noun}" for key, noun in counts.items() if _is_number(summary.get(key))]
    note = f"\n\nMeasured at the end of the run, on {' and '.join(notes)}." if notes else ""
    kind = "last weights of the run" if which == "last" else "best weights in validation"
    return "\n".join(["## Results", "", f"| measure | {kind} |", "| --- | ---: |", *rows]) + note


def _format_score(score: float, form: str) -> str:
    return f"{100 * score:.2f} %" if form == "share" else format_loss(score)


def _memory(summary: Mapping[str, Any]) -> str:
    peak: Any = summary.get("peak_bytes")
    stored: Any = summary.get("stored_peak_bytes")
    if not _is_number(peak) or not _is_number(summary.get("batch_size")):
        return ""
    rows = [f"| as trained (`policy: {shorten(str(summary.get('policy')), 20)}`) | {peak:,} | {format_bytes(peak)} |"]
    if _is_number(stored):
        rows.append(f"| all activations stored | {stored:,} | {format_bytes(stored)} |")
    names = {"parameter_bytes": "parameters", "gradient_bytes": "gradients", "optimizer_bytes": "optimizer state"}
    rows += [
        f"| {noun} | {summary[key]:,} | {format_bytes(summary[key])} |"
        for key, noun in names.items()
        if _is_number(summary.get(key))
    ]
    batch = f"Activation memory at the peak of an update of {summary['batch_size']:,} samples"
    if _is_number(summary.get("accumulate")) and summary["accumulate"] > 1:
        batch += f" in {summary['accumulate']} parts"
    if _is_number(summary.get("num_processes")) and summary["num_processes"] > 1:
        batch += f" on {summary['num_processes']} processes"
    head = [
        "## Memory",
        "",
        f"{batch}, and the state of training:",
        "",
        "| memory | bytes | |",
        "| --- | ---: | ---: |",
    ]
    return "\n".join([*head, *rows])


def _drift(path: Path) -> str:
    """Return the section about the drift, which a run with `drift_every` has measured."""
    if not path.is_file():
        return ""
    try:
        rows = list(csv.DictReader(read_text(path, _MOST_DRIFT_BYTES).splitlines()))
        errors = [(float(row["error"]), row["update"], row["block"]) for row in rows]
        last = [error for error, update, _ in errors if update == errors[-1][1]]
    except (csv.Error, KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"`{path}` is damaged; restore the file, or move it out of the folder.") from error
    if not errors:
        return ""
    worst, update, block = max(errors, key=lambda row: row[0] if not math.isnan(row[0]) else math.inf)
    num_updates = len({row[1] for row in errors})
    return (
        "## Drift\n\n"
        "Relative distance of the activations that the backward pass rebuilt from the original ones, in "
        f"{counted(num_updates, 'update')}: at most {worst:.2g} (`{shorten(block)}`, after update "
        f"{shorten(update, 20)}), and at most {max(last):.2g} in the last update that was measured."
    )


def _recipe(path: Path, summary: Mapping[str, Any]) -> str:
    if not path.is_file():
        return ""
    import yaml

    try:
        settings = read_yaml(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(error).rstrip('.')}; restore the file, or move it out of the folder.") from error
    kept = {key: value for key, value in settings.items() if key not in _LOCAL and not _is_path(value)}
    cost = []
    if _is_number(summary.get("num_updates")):
        cost.append(counted(summary["num_updates"], "update"))
    if _is_number(summary.get("train_seconds")):
        cost.append(f"{format_seconds(summary['train_seconds'])} in all")
    if _is_number(summary.get("step_seconds")):
        cost.append(f"{format_seconds(summary['step_seconds'])} per update (median)")
    text = yaml.safe_dump(kept, sort_keys=False).strip()
    return "\n".join(["## Recipe", "", *([f"{', '.join(cost)}.", ""] if cost else []), "```yaml", text, "```"])


def _environment(summary: Mapping[str, Any]) -> str:
    machine = summary.get("machine")
    lines = [printable(line) for line in machine if isinstance(line, str)] if isinstance(machine, Sequence) else []
    # The command names files of the machine; the recipe says the rest of it.
    lines = [line for line in lines if not line.startswith("- Command")]
    return "\n".join(["## Environment", "", *lines]) if lines else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and expand_user(value).is_absolute()
