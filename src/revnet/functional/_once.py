"""Gradients that cannot be differentiated again, and raise if they are.

PyTorch's `once_differentiable` lets gradients pass as constants if the gradients of the outputs are constants, as for a
loss that is linear in the outputs, and if the caller asks for second derivatives with respect to some tensors only.
Second derivatives then lack terms, without an error.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revnet._torch_internals import FakeTensor, backward_keeps_graph, is_batched_gradient

_LIBRARY = torch.library.Library("revnet", "FRAGMENT")
_LIBRARY.define("differentiated_once(Tensor gradient, Tensor[] sources, str message) -> Tensor")


def differentiated_once(gradient: Tensor, sources: Sequence[Tensor | None], message: str) -> Tensor:
    """Return a gradient that a backward pass has computed, so that differentiating it raises an error.

    Args:
        gradient: The gradient.
        sources: All tensors that it depends on, or that these depend on.
        message: Text of the error.

    Raises:
        NotImplementedError: The backward pass creates a graph, and is vectorized by `is_grads_batched=True`.
    """
    given = [source for source in sources if source is not None]
    if torch.compiler.is_dynamo_compiling():
        operator: Any = torch.ops.revnet.differentiated_once
        once: Tensor = operator(gradient, given, message)
        return once
    if not torch.is_grad_enabled():
        return gradient
    if any(map(is_batched_gradient, (gradient, *given))):  # Nodes of custom functions would be lost.
        raise NotImplementedError(message)
    return _Once.apply(gradient, message, *given)


@torch.library.impl(_LIBRARY, "differentiated_once", "CompositeImplicitAutograd")
def _compiled(gradient: Tensor, sources: list[Tensor], message: str) -> Tensor:
    """Run in a backward pass that was compiled by a backend such as "eager"; the others trace it, and leave nothing.

    The compiled code disables gradients, so it is unknown whether the backward pass creates a graph or just keeps one.
    """
    if isinstance(gradient, FakeTensor) or not backward_keeps_graph():
        return gradient
    with torch.enable_grad():
        return _Once.apply(gradient, message, *sources)


class _Once(torch.autograd.Function):
    """The identity. Its node leads to all sources, since a backward pass skips nodes that lead to no wanted tensor."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, message: str, *sources: Tensor) -> Tensor:
        ctx.message = message
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(ctx.message)
