"""What a model returns: the tensors in it, and why nothing in it can be trained."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_PLAIN = (Tensor, str, bytes, bool, int, float, complex, type(None))
"""Types of leaves that hold no other tensors."""


def leaves_of_output(output: Any) -> list[Any]:
    """Return what a model's output contains, in dataclasses and in subclasses of dict, list and tuple too."""
    leaves = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Mapping):
            leaves += leaves_of_output(list(leaf.values()))
        elif isinstance(leaf, list | tuple):
            leaves += leaves_of_output(list(leaf))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            leaves += leaves_of_output([getattr(leaf, field.name, None) for field in fields(leaf)])
        else:
            leaves.append(leaf)
    return leaves


def explain_no_gradient(model: nn.Module, output: Any) -> str:
    """Return why no tensor in the output of `model` requires a gradient, and the way out, in one line."""
    subject = f"`model` (={type(model).__name__})"
    leaves = leaves_of_output(output)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    unknown = next((type(leaf).__name__ for leaf in leaves if not isinstance(leaf, _PLAIN)), None)
    if unknown is not None:
        return (
            f"{subject} returned an object of the class {unknown}, in which no tensors were found; pass `loss=`, a "
            "function from the output to a scalar tensor."
        )
    if not tensors:
        returned = "None" if output is None else f"an object of the class {type(output).__name__}"
        return (
            f"{subject} returned {returned}, which holds no tensor, so nothing can be trained; return a tensor from "
            "`forward`, or pass `loss=`, a function from the output to a scalar tensor."
        )
    dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in tensors}))
    if not any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors):
        return (
            f"{subject} returned tensors of {dtypes}, which have no gradients, so nothing can be trained; return "
            "floating-point tensors."
        )
    if any(parameter.requires_grad for parameter in model.parameters()):
        return (
            f"{subject} has no output that requires a gradient, although parameters do, so nothing can be trained; do "
            "not detach the output."
        )
    return f"{subject} has no output that requires a gradient, so nothing can be trained; unfreeze a parameter."
