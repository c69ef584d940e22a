"""The model card: `README.md` of a folder with a trained network."""

from collections.abc import Mapping, Sequence
from typing import Any

from revnet._outside_text import printable

CARD = "README.md"
_TAGS = ("revnet", "reversible", "model_hub_mixin", "pytorch_model_hub_mixin")
"""Tags of the card; the hub counts models of its mixins by the last two."""
_PIPELINES = {
    "image": "image-classification",
    "density": "unconditional-image-generation",
    "text": "text-generation",
    "volume": "image-segmentation",
}


def front_matter(task: str | None, extra: Mapping[str, Any] | None = None) -> str:
    """Return the metadata that the hub reads at the start of a card.

    Args:
        task: Kind of input, such as "image"; None to leave the task out.
        extra: More entries, with values of text.
    """
    lines = ["library_name: revnet"]
    if task in _PIPELINES:
        lines.append(f"pipeline_tag: {_PIPELINES[task]}")
    lines += [f"{name}: {value}" for name, value in (extra or {}).items()]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in _TAGS), "---"])


def format_card(task: str | None, title: str, sections: Sequence[str]) -> str:
    """Return a card.

    Args:
        task: Kind of input, such as "image".
        title: Title, in one line.
        sections: Paragraphs, code blocks and tables in Markdown; empty ones are left out.
    """
    return "\n\n".join([front_matter(task), f"# {printable(title)}", *filter(None, sections)]) + "\n"


def describe_class(class_name: str, num_parameters: int) -> str:
    """Return the first paragraph of a card."""
    return (
        f"A `{class_name}` of revnet, reversible residual networks for PyTorch, with {num_parameters:,} parameters. "
        "Reversible blocks compute their activations again in the backward pass, so the activation memory of training "
        "does not grow with depth."
        if class_name != "ResNet"
        else f"A `ResNet` of revnet, with {num_parameters:,} parameters."
    )


def how_to_load(name: str, code: Sequence[str]) -> str:
    """Return the section that shows how to load the model.

    Args:
        name: Name of the model on the hub, or of its folder.
        code: Lines of Python, in which `NAME` stands for the name.
    """
    shown = printable(name).replace('"', "")
    return "\n".join(["## Use", "", "```python", *(line.replace("NAME", shown) for line in code), "```"])
