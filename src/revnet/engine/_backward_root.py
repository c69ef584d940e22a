"""Backward passes of tensors that no longer exist, and of tensors that come from outside the graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from revnet._types import Streams


class BackwardRoot:
    """The end of a graph. It keeps the graph, and none of the tensors that the graph computed.

    Args:
        tensors: The tensors at which the graph ends. They are not kept.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._grads: list[Tensor | None] = []
        self._root: Tensor | None = _Exit.apply(self._grads, *tensors)

    def backward(self, grads: Sequence[Tensor | None]) -> None:
        """Run the backward pass from the gradients of the tensors, once. The graph is freed.

        Args:
            grads: The gradients, or None where there is none. A list is emptied, so that each gradient is freed as soon
                as the backward pass has used it.
        """
        self._grads[:] = grads
        if isinstance(grads, list):
            grads.clear()
        root, self._root = self._root, None
        assert root is not None
        if root.requires_grad:
            torch.autograd.backward(root, torch.empty_like(root))


class BackwardEntry:
    """The beginning of a graph. It collects the gradients of the tensors that enter there."""

    def __init__(self) -> None:
        self._box: list[Any] = []

    def enter(self, tensors: Sequence[Tensor]) -> Streams:
        """Return the tensors as results of a node, which keeps none of them.

        A leaf would be kept, by the node that accumulates its gradient.
        """
        self._box[:] = tensors
        entered: Streams = _Enter.apply(torch.empty(0, requires_grad=True), self._box)
        return entered

    def take_grads(self, count: int) -> list[Tensor | None]:
        """Return the gradients of the tensors, once. A tensor that the backward pass did not reach has none."""
        grads, self._box[:] = list(self._box), []
        return grads or [None] * count


class _Exit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grads: list[Tensor | None], *tensors: Tensor) -> Tensor:
        ctx.grads = grads
        ctx.set_materialize_grads(False)
        return tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        # Emptied: the list lives as long as the node.
        grads, ctx.grads[:] = list(ctx.grads), []
        return None, *grads


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, box: list[Any]) -> tuple[Tensor, ...]:
        # The tensors are no inputs of the node, and the node saves none of them.
        ctx.box = box
        ctx.set_materialize_grads(False)
        tensors, box[:] = list(box), []
        return tuple([tensor.detach() for tensor in tensors])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.box[:] = grads
        return None, None
