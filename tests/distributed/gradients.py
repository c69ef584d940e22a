"""Comparison of the gradients of two modules, whose parameters may be sharded."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.helpers import assert_close


def whole(tensor: Tensor | None) -> Tensor | None:
    """Gather a tensor that is sharded. All processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_gradients(model: nn.Module, expected: nn.Module, scale: float = 1.0) -> None:
    """Check that the gradients of `model` are `scale` times the gradients of `expected`, up to rounding."""
    for parameter, twin in zip(model.parameters(), expected.parameters(), strict=True):
        grads = [whole(parameter.grad), whole(twin.grad)]
        assert (grads[0] is None) == (grads[1] is None)
        if grads[0] is not None:
            assert_close(grads[0], grads[1] * scale)


def gradient_error(model: nn.Module, expected: nn.Module) -> float:
    """Return the relative error of all gradients together."""
    mine, others = (
        torch.cat([whole(parameter.grad).flatten() for parameter in module.parameters()])
        for module in (model, expected)
    )
    return ((mine - others).norm() / others.norm()).item()
