"""Measure the drift of one training step by running it."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from revnet._checks import check_step_arguments
from revnet._model_output import explain_no_gradient
from revnet.engine import DriftMeter
from revnet.errors import ReconstructionWarning
from revnet.nn import Store, set_policy
from revnet.nn._restore import restoring_policies, restoring_state
from revnet.nn.blocks._blocks_in_runs import BlockInRun, blocks_in_runs
from revnet.numerics._block_drift import GradientDrift
from revnet.numerics._drift import Drift
from revnet.numerics._drift_from_records import drift_of
from revnet.numerics._gradients import Gradients, angle_and_error, parameter_gradients

Loss = Callable[[Any], Tensor]


def measure_drift(
    model: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    gradients: bool = False,
    autocast: torch.dtype | None = None,
) -> Drift:
    """Run one training step of `model` and compare rebuilt activations with the original ones.

    The step is the forward pass, the loss and the backward pass, under the policies and couplings of the model. The
    model is left unchanged: its policies, keyframes, gradients (`.grad`) and buffers, and the random state.

    Args:
        model: A model with reversible blocks, in the mode (training or evaluation) to measure.
        inputs: Arguments of the model, on its device. Use a batch as in training, since drift depends on it.
        kwargs: Keyword arguments of the model.
        loss: Function from the model's output to a scalar; None for a weighted sum of all outputs, with fixed random
            weights. The drift of gradients depends on it, the drift of activations does not.
        gradients: Also run a step with all activations stored, and compare the gradients of each block and of the whole
            model.
        autocast: Data type in which autocast runs the forward pass and the loss, such as `torch.bfloat16`; None keeps
            the current setting.

    Returns:
        Errors and amplification of all blocks. `print` shows a table, and `plot` draws a picture.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The model has no reversible block, or the loss depends on no parameter that requires a gradient;
            with `gradients`, a block cannot be stored.
        ReconstructionError: A stream left the range in which `FixedPoint` is exact.

    Numerics:
        Streams are compared at about a hundred elements, so errors are accurate to a few percent. Both steps see the
        same weights, inputs, buffers and random numbers. On a GPU, kernels that add in varying order limit how small
        the errors of gradients can be.
    """
    check_step_arguments(model, kwargs, loss, autocast)
    model = getattr(model, "_orig_mod", model)  # compiled code cannot be watched, and computes the same
    blocks = blocks_in_runs(model)
    if not blocks:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no reversible block, so nothing is rebuilt; build it from "
            "`ReversibleSequential`, make it reversible with `revnet.convert`, or pass a reversible model, such as "
            "`revnet38`."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"`model` (={type(model).__name__}) has no parameter that requires a gradient; unfreeze one.")
    if gradients:
        _check_can_be_stored(blocks)

    def step() -> Gradients:
        device = _device_of(model, inputs, kwargs).type
        context = nullcontext if autocast is None else partial(torch.autocast, device, autocast)
        to_scalar = _checked(loss) if loss else partial(_weighted_sum, model)
        return parameter_gradients(model, to_scalar, inputs, context, kwargs)

    meter = DriftMeter(is_quiet=True)
    with torch.inference_mode(False), restoring_state(model), _unwarned(), meter.on():
        rebuilt = step()
        drift = drift_of(model, meter.records)
    if not gradients:
        return drift
    with torch.inference_mode(False), restoring_state(model), restoring_policies(model):
        set_policy(model, Store())
        stored = step()
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    drifts = list(drift.blocks)
    for index, block in enumerate(blocks):
        own = [names[id(parameter)] for parameter in block.module.parameters() if id(parameter) in names]
        if own:
            drifts[index] = replace(drifts[index], gradient=_gradient_drift(own, rebuilt, stored))
    return replace(drift, blocks=tuple(drifts), gradient=_gradient_drift(stored, rebuilt, stored))


@contextmanager
def _unwarned() -> Iterator[None]:
    """Suppress the engine's warnings; the verdict says the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReconstructionWarning)
        yield


def _check_can_be_stored(blocks: Sequence[BlockInRun]) -> None:
    for block in blocks:
        if not block.has_policy:
            raise ValueError(
                f"`gradients` (=True) needs the stored twin, but the block `{block.name or 'model'}` is outside a "
                "ReversibleSequential, where it cannot be stored; put it into one."
            )


def _device_of(model: nn.Module, *inputs: Any) -> torch.device:
    tensors = [*model.parameters(), *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))]
    return next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), torch.device("cpu"))


def _gradient_drift(names: Iterable[str], rebuilt: Gradients, stored: Gradients) -> GradientDrift:
    names = list(names)
    angle, error = angle_and_error([rebuilt[name] for name in names], [stored[name] for name in names])
    return GradientDrift(error, angle)


def _checked(loss: Loss) -> Loss:
    """Return the loss with checks that its value can be differentiated."""

    def checked(output: Any) -> Tensor:
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            returned = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"`loss` returned {returned}; it must return a scalar tensor: take the mean or the sum.")
        if value.is_complex():
            raise TypeError(f"`loss` returned a {value.dtype} tensor; it must return a real scalar: take `.abs()`.")
        if not value.requires_grad:
            raise ValueError(
                "`loss` returned a tensor that requires no gradient, so nothing can be trained; do not detach the "
                "output."
            )
        return value

    return checked


def _weighted_sum(model: nn.Module, output: Any) -> Tensor:
    """Return the sum of all outputs that require a gradient, with fixed random weights.

    The plain sum would not do: after a normalization, it is nearly constant.
    """
    total: Tensor | None = None
    generator = torch.Generator().manual_seed(0)
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            real = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
            weights = torch.randn(real.shape, generator=generator).to(real.device, real.dtype)
            term = (real * weights).sum()
            total = term if total is None else total + term
    if total is None:
        raise ValueError(explain_no_gradient(model, output))
    return total
