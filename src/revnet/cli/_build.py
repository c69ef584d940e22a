"""The training step of `revnet plan` and `revnet memory`: its model, inputs, optimizer and device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from revnet._memory_readings import free_bytes
from revnet.cli._blame import is_raised_by_revnet
from revnet.cli._model import build_model
from revnet.cli._step import StepFlags
from revnet.errors import RevnetError
from revnet.memory import format_bytes
from revnet.models import published_image_size
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
    inputs: Tensor
    device: torch.device
    """Where the step is to run; without data, model and inputs are not there."""
    options: dict[str, Any]
    """Further arguments of `plan`, `predict` and `measure`."""
    description: str
    """What it is, in one line."""


def build_step(flags: StepFlags) -> BuiltStep:
    """Build a step without data.

    Raises:
        ValueError: There is no such model or device, or the model cannot be built.
    """
    device = find_cpu_or_cuda(flags.device)
    model = build_model(flags.model, is_real=False)
    shape = flags.input_shape
    if shape is None:
        size = flags.image or (224 if flags.is_own else published_image_size(flags.model))
        shape = (3, size, size)
    try:
        inputs = torch.empty(flags.batch, *shape, dtype=getattr(torch, flags.input_dtype), device="meta")
    except (RuntimeError, TypeError) as error:  # an integer that is too long
        raise ValueError(f"{flags.batch} inputs of {_join(shape)} are more than PyTorch can count.") from error
    options = {
        "optimizer": _OPTIMIZERS[flags.optimizer],
        "autocast": torch.bfloat16 if flags.precision == "bf16-mixed" else None,
    }
    description = (
        f"{flags.model}: a training step on {flags.batch} input{'s' * (flags.batch > 1)} of {_join(shape)}, "
        f"{_OPTIMIZER_NAMES[flags.optimizer]}, {flags.precision}, {device}"
    )
    return BuiltStep(model, inputs, device, options, description)


def with_data(step: BuiltStep, flags: StepFlags, *, needed_bytes: int | None) -> BuiltStep:
    """Build the step again with data, on its device: random inputs, or zeros if they are integers.

    Args:
        step: The step without data.
        flags: What it was built from.
        needed_bytes: What it will need at once; None if that is not known.

    Raises:
        ValueError: So much is not free.
    """
    free = free_bytes(step.device)
    if needed_bytes is not None and free is not None and needed_bytes > free:
        raise ValueError(
            f"`--measure` needs {format_bytes(needed_bytes)} on {step.device}, where {format_bytes(free)} are free; "
            "leave it out, or pass a smaller `--batch`."
        )
    shape, dtype = step.inputs.shape, step.inputs.dtype
    if dtype.is_floating_point:
        inputs = torch.randn(shape, dtype=dtype, device=step.device)
    else:
        inputs = torch.zeros(shape, dtype=dtype, device=step.device)  # an index that any table has
    return replace(step, model=build_model(flags.model, is_real=True).to(step.device), inputs=inputs)


@contextmanager
def running_it() -> Iterator[None]:
    """Tell in one line what happens while a step really runs: memory runs out, the user's code fails."""
    try:
        yield
    except Exception as error:
        if isinstance(error, RevnetError) or (isinstance(error, ValueError) and is_raised_by_revnet(error)):
            raise
        raise ValueError(f"the step failed: {type(error).__name__}: {error}") from error


def _join(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"


def find_cpu_or_cuda(name: str) -> torch.device:
    """The device that a flag names; `auto` takes a GPU of CUDA, or none."""
    device = find_device(name)
    if device.type != "mps":
        return device
    if name != "auto":
        raise ValueError(f"`--device` (={name}) must be auto, cpu or cuda.")
    return torch.device("cpu")
