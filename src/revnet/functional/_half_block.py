"""One half of a reversible block: a residual function, and the stream that it updates."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from revnet.functional._storage import version_of


class HalfBlock(NamedTuple):
    """One residual function and the stream that it updates from the other one.

    A reversible block is two of them: `y1 = x1 + f(x2)` updates stream 0, then `y2 = x2 + g(y1)` updates stream 1.
    """

    function: nn.Module
    updates: Literal[0, 1]
    name: str = "f"
    """The function's place in the model, for errors: "blocks.3.f"."""


def residual_of(half_block: HalfBlock, source: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Call a residual function, and refuse one that writes over its input: the input could not be rebuilt."""
    if torch.compiler.is_dynamo_compiling():  # Traced code has no versions; eager code and `compiled` have.
        return half_block.function(source, *args, **kwargs)
    version = version_of(source)
    residual = half_block.function(source, *args, **kwargs)
    if version_of(source) != version:
        raise RuntimeError(
            f"`{half_block.name}` modified its input in place, which a reversible block cannot undo; use the "
            "out-of-place form of its first operation (`inplace=False`), or `clone` the input."
        )
    return residual
