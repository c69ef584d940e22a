"""The memory of a training step, predicted from shapes alone."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from revnet._torch_internals import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
    UnsupportedOperatorException,
    active_fake_mode,
)
from revnet.errors import PredictionError
from revnet.memory._fake import Faker, faked
from revnet.memory._optimizer import OptimizerCost, OptimizerFactory, as_factory, optimizer_cost
from revnet.memory._recorder import Recorder
from revnet.memory._step import Loss, StepResult, check_step, device_of, run_step, tensors_in
from revnet.memory._step_memory import StepMemory
from revnet.memory._summary import summarise


def predict(
    model: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: OptimizerFactory | Optimizer | None = None,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> StepMemory:
    """Count the bytes of a training step of `model` without running it.

    The model's own code runs, on fake tensors, which have shapes and no data: a step that needs a hundred GiB is
    counted on a laptop in about the time of a small one, model and inputs on the meta device included. The figures are
    those of `measure` on `device`, to the byte on the CPU, but for kernels that hand on a workspace of their own, such
    as oneDNN's LSTM. On a GPU they lack all workspaces; and where PyTorch has another kernel for a GPU (attention, an
    optimizer that updates all parameters at once), the bytes are those of the GPU only if `device` says so, on a
    machine that has one.

    The model is left as it was, attributes of its modules included. Variables elsewhere that its code counts in or
    writes to change as in every run.

    Args:
        model: Any module, in the mode (training or evaluation) in which it shall be predicted.
        inputs: Its arguments: real tensors, or tensors on the meta device.
        kwargs: Its keyword arguments.
        optimizer: Makes the optimizer from parameters: `torch.optim.AdamW`, or
            `partial(torch.optim.SGD, lr=0.1, momentum=0.9)`. An optimizer of the model is accepted too. It is not
            changed. None counts no optimizer. The step that is counted comes after the first, when the optimizer has
            its state.
        loss: From the model's output to a scalar; None for the sum of all outputs that require a gradient.
        autocast: The lower precision under which the forward pass and the loss run, such as `torch.bfloat16`; None for
            what is in force.
        dtype: As if the model and all floating-point inputs were converted to this type.
        device: As if model and inputs were there; None for where the model is, the CPU if that is the meta device.

    Raises:
        PredictionError: The model, or the loss, fails on inputs of these shapes, or needs the values of tensors.
        TypeError: An argument is of another kind than said above.
        ValueError: No output depends on anything that requires a gradient, a lazy module has no shape yet, or there is
            no such device.
    """
    with predicting(
        model, inputs, kwargs, optimizer=optimizer, loss=loss, autocast=autocast, dtype=dtype, device=device
    ) as prediction:
        return prediction.memory()


@contextmanager
def predicting(
    model: nn.Module,
    inputs: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    *,
    optimizer: OptimizerFactory | Optimizer | None,
    loss: Loss | None,
    autocast: torch.dtype | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Iterator["Prediction"]:
    """Fake tensors in the place of a model's own, for any number of steps; otherwise as `predict`."""
    check_step(model, kwargs, loss, autocast)
    factory = as_factory(optimizer, list(model.parameters()))
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"`dtype` (={dtype!r}) must be a floating-point type such as `torch.bfloat16`, or None.")
    place = None if device is None else _checked_device("device", device)
    if place is None:
        _checked_device("model", device_of(model, inputs, kwargs))
    faker = Faker(place, dtype)
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(active_fake_mode() or FakeTensorMode(allow_non_fake_inputs=True))
        if torch.get_default_device().type == "meta":
            stack.enter_context(torch.device("cpu" if place is None else place))
        stack.enter_context(_quiet())
        stack.enter_context(faked(model, faker))
        args, named = tree_map_only(Tensor, faker.fake, (inputs, dict(kwargs or {})))
        yield Prediction(model, args, named, optimizer=factory, loss=loss, autocast=autocast)


class Prediction:
    """A model with fake tensors in it, whose step can be run again and again, under changing policies.

    Args:
        model: The model, with fake parameters and buffers.
        args: Its positional arguments, with fake tensors.
        kwargs: Its keyword arguments, with fake tensors.
        optimizer: Makes the optimizer; None for none.
        loss: What to differentiate; None for the sum of all outputs.
        autocast: The lower precision of the forward pass; None for what is in force.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        optimizer: OptimizerFactory | None,
        loss: Loss | None,
        autocast: torch.dtype | None,
    ):
        self._model = model
        self._args = args
        self._kwargs = kwargs
        self._optimizer = optimizer
        self._loss = loss
        self._autocast = autocast
        self._cost: OptimizerCost | None = None

    def run(self) -> StepResult:
        """Run the step of the model as it now is."""
        for tensor in [*self._model.parameters(), *tensors_in(self._args, self._kwargs)]:
            tensor.grad = None
        guard = partial(_explained, self._model, _describe(tensors_in(self._args, self._kwargs)))
        return run_step(self._model, self._args, self._kwargs, loss=self._loss, autocast=self._autocast, guard=guard)

    def memory(self) -> StepMemory:
        """The memory of the step of the model as it now is."""
        result = self.run()
        if self._optimizer is not None and self._cost is None:  # It does not depend on policies.
            device_type = device_of(self._model, self._args, self._kwargs).type
            parameters = list(self._model.parameters())
            self._cost = optimizer_cost(self._optimizer, parameters, result.has_gradient, device_type)
        return summarise(self._model, result, self._cost)


def _checked_device(name: str, value: torch.device | str) -> torch.device:
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`{name}` (={value!r}) must be a device of PyTorch, such as 'cpu' or 'cuda'.") from error
    if device.type == "meta":
        return torch.device("cpu")
    if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_available()):
        raise ValueError(
            f"`{name}` (={device}) is on a device that PyTorch cannot use here; predict for the CPU, with "
            "`device='cpu'`: the bytes differ little."
        )
    return device


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the traces that PyTorch logs of errors on fake tensors: the error says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _explained(model: nn.Module, given: str, what: str, recorder: Recorder) -> Iterator[None]:
    """Say in one line what failed, where, and why."""
    try:
        yield
    except Exception as error:
        name = recorder.module_at_work
        where = f"`{name}` of {type(model).__name__}" if name else type(model).__name__
        cause = _needs_values(error)
        if cause is None:
            raise PredictionError(f"{what} of {where} failed, {given}: {_first_line(error)}") from error
        raise PredictionError(
            f"{what} of {where} cannot be predicted, for {cause}; measure it for real with `revnet.memory.measure`, on "
            "a small batch."
        ) from error


def _needs_values(error: Exception) -> str | None:
    """What an error says that only fake tensors have; None for one that real tensors may have too."""
    if isinstance(error, DataDependentOutputException):
        return "it asks for the value of a tensor (`.item()`, `if x > 0`)"
    if isinstance(error, DynamicOutputShapeException):
        return f"a shape depends on values ({error.func})"
    if isinstance(error, UnsupportedOperatorException | UnsupportedFakeTensorException):
        return f"an operator does not say what it does to shapes ({_first_line(error)})"
    is_slip = isinstance(error, TypeError | AttributeError)  # Which only names the type of what it met.
    if not is_slip and any(sign in str(error) for sign in ("FakeTensor", "fake", "data pointer", "tensor subclasses")):
        return f"it needs data ({_first_line(error)})"
    return None


def _describe(inputs: list[Tensor]) -> str:
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
    return f"on inputs of shape {shapes}" if shapes else "without inputs"


def _first_line(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), "").replace("FakeTensor", "Tensor")
    line = line if len(line) <= 200 else f"{line[:200]}..."
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
