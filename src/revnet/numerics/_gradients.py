"""Gradients of a step, and the difference between two of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

Gradients = dict[str, Tensor]
"""Gradients by the names of the parameters."""


def parameter_gradients(
    model: nn.Module,
    loss_fn: Callable[[Any], Tensor],
    inputs: tuple[Any, ...],
    forward_context: Callable[[], AbstractContextManager[Any]],
    kwargs: Mapping[str, Any] | None = None,
) -> Gradients:
    """Run a step and return the gradients of all parameters that require one, as real tensors.

    Args:
        model: The model.
        loss_fn: Function from its output to a scalar.
        inputs: Arguments of the model.
        forward_context: Makes the context for the forward pass and the loss, such as autocast.
        kwargs: Keyword arguments of the model.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with torch.enable_grad():
        with forward_context():
            loss = loss_fn(model(*inputs, **(kwargs or {})))
        # `torch.autograd.grad` leaves the `.grad` of the parameters alone.
        grads = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    real = [torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad for grad in grads]
    return dict(zip(parameters, real, strict=True))


def angle_and_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Return the angle in degrees between two vectors, and their distance over the length of `expected`.

    Numerics:
        Lengths are computed in float64, and angles by Kahan's formula, which is accurate for small angles.

    References:
        Kahan (2006), How Futile are Mindless Assessments of Roundoff in Floating-Point Computation?, section 12.
    """
    length, expected_length = _length(actual), _length(expected)
    distance = _length([a.double() - b.double() for a, b in zip(actual, expected, strict=True)])
    if length == 0 or expected_length == 0:
        return (0.0, 0.0) if distance == 0 else (90.0, math.inf if expected_length == 0 else 1.0)
    scaled = [(a.double() / length, b.double() / expected_length) for a, b in zip(actual, expected, strict=True)]
    # The arc cosine of the scalar product would round all angles below 1e-6 degrees to 0.
    half = math.atan2(_length([a - b for a, b in scaled]), _length([a + b for a, b in scaled]))
    return math.degrees(2 * half), distance / expected_length


def _length(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
