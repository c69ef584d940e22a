"""The training step of `revnet plan` and `revnet memory`: model, inputs, optimizer and device."""

from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from revnet._memory_readings import free_bytes
from revnet._units import counted
from revnet.cli._errors import UsageError
from revnet.cli._model import build_model
from revnet.cli._step_flags import StepFlags
from revnet.memory import format_bytes
from revnet.models import published_image_size
from revnet.nn._cross_entropy_head import cross_entropy_heads
from revnet.training.device import find_device

_OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, momentum=0.9),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "none": None,
}
_OPTIMIZER_NAMES = {"sgd": "SGD with momentum", "adam": "Adam", "adamw": "AdamW", "none": "no optimizer"}


@dataclass(frozen=True, eq=False)
class BuiltStep:
    """A training step."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    device: torch.device
    """Device of the step. A step without data has its model and inputs on the meta device."""
    options: dict[str, Any]
    """Additional arguments of `plan`, `predict` and `measure`."""
    description: str
    """Description in one line."""
    shapes: str
    """Shapes of the inputs without the batch, as text."""
    conditions: str
    """Optimizer, precision and device, as text."""


def build_step(flags: StepFlags) -> BuiltStep:
    """Build a step without data.

    Raises:
        ValueError: The model or the device does not exist, or the model cannot be built.
    """
    device = cpu_or_cuda(flags.device)
    model = build_model(flags.model, is_real=False)
    shapes, inputs = empty_inputs(flags)
    options = {
        "optimizer": _OPTIMIZERS[flags.optimizer],
        "autocast": torch.bfloat16 if flags.precision == "bf16-mixed" else None,
    }
    words = ""
    if flags.loss != "sum":
        _check_loss(flags, model)
        options["kwargs"] = {"targets": torch.empty(inputs[0].shape, dtype=torch.int64, device="meta")}
        words = ", cross-entropy" if flags.loss == "cross-entropy" else ", chunked cross-entropy"
        for head in cross_entropy_heads(model):
            head.is_chunked = flags.loss == "chunked"
    conditions = f"{_OPTIMIZER_NAMES[flags.optimizer]}, {flags.precision}, {device}{words}"
    samples = counted(flags.batch, "input")
    description = f"{flags.model}: a training step on {samples} of {_join(shapes)}, {conditions}"
    return BuiltStep(model, inputs, device, options, description, _join(shapes), conditions)


def empty_inputs(flags: StepFlags) -> tuple[tuple[tuple[int, ...], ...], tuple[Tensor, ...]]:
    """Return the shapes of the inputs of a step without the batch, and the inputs on the meta device."""
    shapes = flags.input_shapes
    if shapes is None:
        size = flags.image or (224 if flags.is_own else published_image_size(flags.model))
        shapes = ((3, size, size),)
    try:
        inputs = tuple(
            torch.empty(flags.batch, *shape, dtype=getattr(torch, dtype), device="meta")
            for shape, dtype in zip(shapes, flags.input_dtypes, strict=True)
        )
    except (RuntimeError, TypeError) as error:  # an integer out of range
        raise UsageError(
            f"{counted(flags.batch, 'input')} of {_join(shapes)} are more than PyTorch can count."
        ) from error
    return shapes, inputs


def fill_inputs(
    inputs: tuple[Tensor, ...], device: torch.device, *, num_rows: int = 1, generator: torch.Generator | None = None
) -> tuple[Tensor, ...]:
    """Return inputs with random data on a device.

    Args:
        inputs: Tensors without data.
        device: The device.
        num_rows: Number that integers are below; by default they are 0, a valid index for any embedding.
        generator: Generator of the random numbers; None for the global one.
    """
    options: dict[str, Any] = {"device": device, "generator": generator}
    return tuple(
        torch.randn(like.shape, dtype=like.dtype, **options)
        if like.is_floating_point()
        else torch.randint(num_rows, like.shape, dtype=like.dtype, **options)
        for like in inputs
    )


def materialize(step: BuiltStep, flags: StepFlags, *, needed_bytes: int | None) -> BuiltStep:
    """Return the step with data on its device: random inputs, or zeros if they are integers.

    Args:
        step: The step without data.
        flags: The options that it was built from.
        needed_bytes: Memory that it needs at once; None if unknown.

    Raises:
        ValueError: The device does not have this much free memory.
    """
    free = free_bytes(step.device)
    if needed_bytes is not None and free is not None and needed_bytes > free:
        raise UsageError(
            f"`--measure` needs {format_bytes(needed_bytes)} on {step.device}, where {format_bytes(free)} are free; "
            "leave it out, or pass a smaller `--batch`."
        )
    inputs = fill_inputs(step.inputs, step.device)
    model = build_model(flags.model, is_real=True).to(step.device)
    options = dict(step.options)
    if flags.loss != "sum":
        options["kwargs"] = {"targets": torch.zeros(inputs[0].shape, dtype=torch.int64, device=step.device)}
        for head in cross_entropy_heads(model):
            head.is_chunked = flags.loss == "chunked"
    return replace(step, model=model, inputs=inputs, options=options)


def _check_loss(flags: StepFlags, model: nn.Module) -> None:
    if not cross_entropy_heads(model) or "targets" not in signature(model.forward).parameters:
        raise UsageError(
            f"`--loss` (={flags.loss}) needs a model that takes `targets` and passes them to a "
            f"revnet.nn.CrossEntropyHead; {flags.model} does not. Leave it out."
        )


def _join(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " and ".join("x".join(map(str, shape)) or "one number" for shape in shapes)


def cpu_or_cuda(name: str) -> torch.device:
    """Return the device of `--device`; `auto` is a CUDA device if available, otherwise the CPU."""
    device = find_device(name)
    if device.type != "mps":
        return device
    if name != "auto":
        raise UsageError(f"`--device` (={name}) must be auto, cpu or cuda.")
    return torch.device("cpu")
