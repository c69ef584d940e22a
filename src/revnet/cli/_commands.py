"""The table of commands."""

from revnet.cli._help import fill, help_width

COMMANDS = {
    "train": "train a classifier; by default, a small RevNet on handwritten digits (also `train nice`, `train lm`)",
    "evaluate": "test a checkpoint: errors, hardest classes, confusions",
    "predict": "classify image files",
    "sample": "sample images from a density (`train nice`), or fill in missing halves",
    "score": "compute the likelihood of image files under a density",
    "generate": "continue a text with a language model (`train lm`)",
    "export": "write the model of a run to a file for programs without revnet: ONNX or pt2",
    "convert": "try a conversion to a reversible network on a model of timm, torchvision or transformers",
    "push": "send a run to the Hugging Face hub, with a model card",
    "reproduce": "train the networks in a table of results, and compare them with the paper",
    "figure": "reproduce a figure of the paper: gradient angles, or memory and compute against depth",
    "memory": "show where the memory of a training step goes, for any model",
    "plan": "fit a training step into a memory budget: which blocks to reverse, checkpoint or store",
    "doctor": "measure the error of rebuilt activations and gradients, and suggest remedies",
    "models": "list the models with their parameters and FLOPs",
    "recipes": "list the recipes that `--config` takes by name",
    "bench": "compare memory, time and correctness with other reversible libraries",
}
"""Description of each command, by name."""

SUBCOMMANDS = {"train": ("nice", "lm")}
"""Words after a command that select another function: `revnet train nice` runs `train_nice`."""

COMPLETION = "--print-completion"
"""Option that prints a script for a shell; `revnet --print-completion bash` runs `completion`."""

_OPTIONS = {
    "-h, --help": "show this help; `revnet COMMAND --help` shows the help of a command",
    "--version": "show the version",
    f"{COMPLETION} SHELL": "print the completion script of bash, zsh or tcsh",
}
_ENVIRONMENT = {"REVNET_DEBUG=1": "show tracebacks of errors"}


def format_help() -> str:
    """Return the help of `revnet` itself, for the width of the terminal."""
    sections = {"commands": COMMANDS, "options": _OPTIONS, "environment": _ENVIRONMENT}
    about = "Reversible residual networks: activation memory that does not grow with depth."
    texts = ["usage: revnet COMMAND [options]", fill(about, help_width())]
    return "\n\n".join(texts + [_section(title, rows) for title, rows in sections.items()]) + "\n"


def _section(title: str, rows: dict[str, str]) -> str:
    lines = [f"{title}:"]
    for name, text in rows.items():
        indent = " " * 13
        start = f"  {name:11}" if len(name) < 11 else f"  {name}\n{indent}"
        first, *rest = fill(text, help_width() - len(indent)).splitlines()
        lines += [start + first, *(indent + line for line in rest)]
    return "\n".join(lines)
