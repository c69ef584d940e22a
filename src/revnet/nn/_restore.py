"""Contexts that run a model and leave it unchanged."""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from revnet._checks import check_module
from revnet._torch_internals import has_internal_overlap
from revnet.engine._tensors import has_values
from revnet.nn._whole_model import policy_holders
from revnet.nn.blocks._reversible_sequential import ReversibleSequential
from revnet.optim._step_in_backward import suspended


@contextmanager
def restoring_state(model: nn.Module) -> Iterator[None]:
    """Clear the gradients of `model`; on exit, restore them and the buffers, the keyframes and the random states.

    Training steps inside this context leave the model and the random state as they were, except for the parameters. A
    `StepInBackward` does not update them.

    Raises:
        TypeError: `model` is not a module.
    """
    check_module("model", model)
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    buffer_dicts = [(module._buffers, dict(module._buffers)) for module in _plain_modules(model)]
    # An expanded buffer cannot be written to, neither by the model nor here.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not has_internal_overlap(buffer)]
    sequences = [module for module in model.modules() if isinstance(module, ReversibleSequential)]
    tolerances = [(sequence, sequence.tolerance_state()) for sequence in sequences]
    devices = {tensor.device for tensor in [*parameters, *model.buffers()]}
    try:
        with restoring_host_random_states(), _restoring_random_states(devices), suspended(parameters):
            for parameter in parameters:
                parameter.grad = None
            yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for buffer_dict, content in buffer_dicts:
            buffer_dict.clear()
            buffer_dict.update(content)
        for sequence, state in tolerances:
            sequence.restore_tolerance(state)
        with torch.no_grad():
            for buffer, value in buffers:
                # A write would break a graph that waits for its backward pass and has saved the buffer.
                if not _same_bits(buffer, value):
                    buffer.copy_(value)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    if not has_values(x) or x.layout is not torch.strided or x.is_quantized:
        return False
    first, second = (tensor.resolve_conj().resolve_neg().contiguous().view(-1) for tensor in (x, y))
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


@contextmanager
def restoring_policies(model: nn.Module) -> Iterator[None]:
    """Restore all policies of `model` on exit."""
    before = [(holder, holder.policies) for holder in policy_holders(model).values()]
    try:
        yield
    finally:
        for holder, policies in before:
            holder.set_policies(policies)


@contextmanager
def restoring_host_random_states() -> Iterator[None]:
    """Restore the random states of Python and of NumPy on exit."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _restoring_random_states(devices: set[torch.device]) -> AbstractContextManager[None]:
    """Return a context that restores PyTorch's random states, of the CPU and of the accelerators among `devices`."""
    others = [device for device in devices if device.type not in ("cpu", "meta")]
    if any(device.type == "mps" for device in others):  # It has one state, and PyTorch asks for no device.
        return _restoring_mps()
    return torch.random.fork_rng(devices=others, device_type=others[0].type if others else "cuda")


@contextmanager
def _restoring_mps() -> Iterator[None]:
    state = torch.mps.get_rng_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.mps.set_rng_state(state)


def _plain_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that can rebind a buffer, which scripted modules cannot."""
    return [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
