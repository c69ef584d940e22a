"""Running a model without changing its state."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from revnet._checks import check_module
from revnet._torch_internals import has_internal_overlap
from revnet.nn._sequential import ReversibleSequential


@contextmanager
def restoring_state(model: nn.Module) -> Iterator[None]:
    """Clear the gradients of `model`. On leaving, restore them, the buffers, the keyframes and the random states.

    Code that runs inside leaves no trace in the model, and code that runs next starts from the same random state.

    Raises:
        TypeError: `model` is not a module.
    """
    check_module("model", model)
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    holders = [(module._buffers, dict(module._buffers)) for module in _plain_modules(model)]
    # A buffer that is expanded cannot be written to, neither by the model nor here.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not has_internal_overlap(buffer)]
    sequences = [module for module in model.modules() if isinstance(module, ReversibleSequential)]
    guards = [(sequence, sequence.tolerance_state()) for sequence in sequences]
    devices = {tensor.device for tensor in [*parameters, *model.buffers()] if tensor.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices):
            for parameter in parameters:
                parameter.grad = None
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for holder, content in holders:
            holder.clear()
            holder.update(content)
        for sequence, state in guards:
            sequence.restore_tolerance(state)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _plain_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that can rebind a buffer, which scripted modules cannot."""
    return [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
