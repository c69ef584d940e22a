"""The drift of one training step, measured by running it."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from revnet.engine import DriftMeter, DriftRecord, HalfBlock
from revnet.errors import ReconstructionWarning
from revnet.nn import (
    AbstractPolicy,
    AbstractReversibleBlock,
    Reverse,
    ReversibleSequential,
    Store,
    set_policy,
)
from revnet.nn._restore import restoring_policies, restoring_state
from revnet.numerics._drift import BlockDrift, Drift, GradientDrift
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
    """Run one training step of `model`, and compare what it rebuilds with what it saw.

    The step is the forward pass, the loss and the backward pass, under the policies and couplings that the model has.
    The model is left as it was: its policies, keyframes, gradients (`.grad`) and buffers, and the random state.

    Args:
        model: A model with reversible blocks, in the mode (training or evaluation) in which it shall be measured.
        inputs: Its arguments, tensors on the model's device: a batch as it is trained on, since drift depends on it.
        kwargs: Its keyword arguments.
        loss: From the model's output to a scalar; None for a weighted sum of all outputs, with fixed random weights.
            Drift of activations does not depend on it, that of gradients does.
        gradients: Run the stored twin too, and compare the gradients of each block and of the whole model.
        autocast: The lower precision under which the forward pass and the loss run, such as `torch.bfloat16`; None for
            what is in force.

    Returns:
        Errors and amplification of all blocks; a table by `print`, a picture by `.plot(path)`, `.verdict`, `.advice`.

    Raises:
        TypeError: An argument is of another kind than said above.
        ValueError: The model has no reversible block, no parameter to train, or none that the loss depends on; with
            `gradients`, one of its blocks cannot be stored.
        ReconstructionError: A stream left the range in which `FixedPoint` is exact.

    Numerics:
        Streams are compared at some hundred of their elements, so an error is known within some percent. Both steps
        see the same weights, inputs, buffers and random numbers; on a GPU, kernels that add in any order put a floor
        under the errors of gradients.
    """
    _check(model, kwargs, loss, autocast)
    model = getattr(model, "_orig_mod", model)  # Compiled code is not watched, and gives the same.
    places = _places(model)
    if not places:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no reversible block, so nothing of it is rebuilt; build it of "
            "`ReversibleSequential`, or pass a reversible model, such as `revnet38`."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"`model` (={type(model).__name__}) has no parameter that requires a gradient; unfreeze one.")
    if gradients:
        _check_can_be_stored(places)

    def step() -> Gradients:
        device = _device_of(model, inputs, kwargs).type
        context = nullcontext if autocast is None else partial(torch.autocast, device, autocast)
        return parameter_gradients(model, _checked(loss) if loss else _weighted_sum, inputs, context, kwargs)

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
    blocks = list(drift.blocks)
    for index, place in enumerate(places):
        own = [names[id(parameter)] for parameter in place.block.parameters() if id(parameter) in names]
        if own:
            blocks[index] = replace(blocks[index], gradient=_gradient_drift(own, rebuilt, stored))
    return replace(drift, blocks=tuple(blocks), gradient=_gradient_drift(stored, rebuilt, stored))


def drift_of(model: nn.Module, records: Sequence[DriftRecord]) -> Drift:
    """Make sense of what a `DriftMeter` has collected of a step of `model`, of any training loop.

    To measure a step costs next to nothing: some hundred elements of what each function reads are kept and compared.

    Args:
        model: The model, with reversible blocks.
        records: `meter.records`, after the backward pass. On a GPU, this waits for it.

    Returns:
        Errors and amplification of all blocks; no gradients, which `measure_drift` compares.
    """
    sequences = [(name, each) for name, each in model.named_modules() if isinstance(each, ReversibleSequential)]
    keyframes = [f"{name}.{keyframe}".lstrip(".") for name, each in sequences for keyframe in each.keyframes]
    tolerance = min((each.tolerance for _, each in sequences if each.tolerance is not None), default=None)
    return replace(_drift_of(_places(model), records), keyframes=tuple(keyframes), tolerance=tolerance)


@contextmanager
def _unwarned() -> Iterator[None]:
    """What the engine would warn of is told by the verdict."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReconstructionWarning)
        yield


def _check(model: nn.Module, kwargs: Mapping[str, Any] | None, loss: Loss | None, autocast: torch.dtype | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` (={type(model).__name__}) must be a module.")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"`kwargs` (={type(kwargs).__name__}) must be a dict of the model's keyword arguments, or None."
        )
    if loss is not None and not callable(loss):
        raise TypeError(f"`loss` (={loss!r}) must be a function from the model's output to a scalar, or None.")
    if autocast not in (None, torch.bfloat16, torch.float16):
        raise TypeError(f"`autocast` (={autocast!r}) must be `torch.bfloat16`, `torch.float16` or None.")


# Where the blocks are -------------------------------------------------------------------------------------------------


class _Place(NamedTuple):
    """A reversible block in the model."""

    name: str
    block: AbstractReversibleBlock
    policy: AbstractPolicy
    chain: Sequence[HalfBlock]
    """The half-blocks that run with its own."""
    start: int
    """Its first one among them."""
    is_in_sequence: bool


def _places(model: nn.Module) -> list[_Place]:
    """All reversible blocks, in the order in which the model has them."""
    places: list[_Place] = []
    within: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, ReversibleSequential):
            chain: list[HalfBlock] = []
            for index, (block, policy) in enumerate(zip(module, module.policies, strict=True)):
                assert isinstance(block, AbstractReversibleBlock)
                prefix = f"blocks.{index}"
                places.append(_Place(f"{name}.{prefix}".lstrip("."), block, policy, chain, len(chain), True))
                chain += block.half_blocks(f"{prefix}.")
                within.add(id(block))
        elif isinstance(module, AbstractReversibleBlock) and id(module) not in within:
            places.append(_Place(name, module, Reverse(), module.half_blocks(), 0, False))
    return places


def _check_can_be_stored(places: Sequence[_Place]) -> None:
    for place in places:
        if not place.is_in_sequence:
            raise ValueError(
                f"`gradients` (=True) needs the stored twin, but the block `{place.name or 'model'}` is outside of a "
                "ReversibleSequential, where it cannot be stored; put it into one."
            )


def _device_of(model: nn.Module, *inputs: Any) -> torch.device:
    tensors = [*model.parameters(), *(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))]
    return next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), torch.device("cpu"))


# From records to blocks -----------------------------------------------------------------------------------------------


_FARTHEST = 8
"""Half-blocks from where a stream is asked for to one that reads it."""


class _Reading(NamedTuple):
    """What a residual function read again."""

    error: float
    distance: int


def _drift_of(places: Sequence[_Place], records: Sequence[DriftRecord]) -> Drift:
    """The error of what each block was given, and how much it grew in it."""
    readings = _readings(records)
    given = []
    for place in places:
        streams = (_reading_of(stream, place.chain, place.start, readings) for stream in range(place.block.num_streams))
        given.append(_joined([reading for reading in streams if reading is not None]))
    drifts = []
    for index, (place, reading) in enumerate(zip(places, given, strict=True)):
        is_last = index + 1 == len(places) or places[index + 1].chain is not place.chain
        behind = None if is_last else given[index + 1]
        error, amplification = None if reading is None else reading.error, None
        # One that is farther from a kept stream was rebuilt from the one behind it; unless the truth was put there.
        if reading is not None and behind is not None and reading.distance > behind.distance:
            amplification = reading.error / behind.error if reading.error and behind.error else None
        is_exact = all(each.coupling.is_exact for each in place.block.half_blocks())
        drifts.append(BlockDrift(place.name, place.policy, is_exact, error, amplification))
    return Drift(tuple(drifts), records[0].dtype if records else None)


def _reading_of(
    stream: int, chain: Sequence[HalfBlock], start: int, readings: Mapping[tuple[int, str], _Reading]
) -> _Reading | None:
    """What was read of a stream as it is before half-block `start`: there or farther on, or before, if nobody wrote."""
    behind = takewhile(lambda half_block: half_block.target != stream, chain[start : start + _FARTHEST])
    before = takewhile(
        lambda half_block: half_block.target != stream, reversed(chain[max(0, start - _FARTHEST) : start])
    )
    for half_block in (*behind, *before):
        reading = readings.get((id(half_block.function), half_block.name))
        if reading is not None:
            return reading
    return None


def _readings(records: Iterable[DriftRecord]) -> dict[tuple[int, str], _Reading]:
    """By function and name; of a function that ran several times, the worst."""
    found: dict[tuple[int, str], _Reading] = {}
    for record in records:
        key, error = (id(record.function), record.name), float(record.error)
        if key not in found or not error <= found[key].error:
            found[key] = _Reading(error, record.distance)
    return found


def _joined(readings: Sequence[_Reading]) -> _Reading | None:
    """The error of all streams."""
    if not readings:
        return None
    error = math.sqrt(sum(reading.error**2 for reading in readings) / len(readings))
    return _Reading(error, min(reading.distance for reading in readings))


def _gradient_drift(names: Iterable[str], rebuilt: Gradients, stored: Gradients) -> GradientDrift:
    names = list(names)
    angle, error = angle_and_error([rebuilt[name] for name in names], [stored[name] for name in names])
    return GradientDrift(error, angle)


def _checked(loss: Loss) -> Loss:
    """The loss, which raises if it cannot be differentiated."""

    def checked(output: Any) -> Tensor:
        value = loss(output)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"`loss` returned {found}; it must return a scalar tensor: take the mean or the sum.")
        if not value.requires_grad:
            raise ValueError(
                "`loss` returned a tensor that requires no gradient, so there is no training step; do not detach the "
                "output."
            )
        return value

    return checked


def _weighted_sum(output: Any) -> Tensor:
    """The outputs that require a gradient, summed up with weights that are always the same.

    Not their plain sum: behind a norm, that is nearly constant.
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
        raise ValueError(
            "the model has no output that requires a gradient, so it has no training step; unfreeze a parameter."
        )
    return total
