"""Predict the memory of a training step from shapes alone."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
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
from revnet.memory.repeats._frame import NotRepeatedError
from revnet.memory.repeats._short_optimizer import short_optimizer_cost
from revnet.memory.repeats._short_step import ShortSteps, find_short_steps
from revnet.memory.step._backward_optimizer import BackwardOptimizer, check_step_in_backward
from revnet.memory.step._fake import TensorFaker, fake_tensors_in
from revnet.memory.step._kept_fakes import KeptFakes, checking_for_kept
from revnet.memory.step._optimizer import OptimizerCost, OptimizerFactory, as_factory, optimizer_cost
from revnet.memory.step._recorder import Recorder
from revnet.memory.step._run_step import Loss, StepResult, check_step, device_of, objects_in, run_step, tensors_in
from revnet.memory.step._step_memory import StepMemory
from revnet.memory.step._summarize import ModuleTable, summarize
from revnet.nn._restore import restoring_host_random_states


def predict(
    model: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: OptimizerFactory | Optimizer | None = None,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    step_in_backward: bool = False,
) -> StepMemory:
    """Count the bytes of a training step of `model` without running it.

    The model's code runs on fake tensors, which have shapes and no data, so a laptop can count a step that needs 100
    GiB in about the time of a small one. Model and inputs may be on the meta device.

    On the CPU, the figures equal the figures of `measure` to the byte, except for kernels that pass on a workspace,
    such as oneDNN's LSTM. On a GPU, they do not include workspaces. Where PyTorch uses other kernels on a GPU
    (attention, optimizers that update all parameters at once), the bytes match only if `device` names the GPU, on a
    machine that has one.

    If a `ReversibleSequential` has 32 or more equal blocks, only some of them run, and the figures of the others follow
    from them, to the byte. Where this cannot be relied on, all blocks run. The code of the model and the loss may run
    several times.

    The model is left unchanged, with everything that it, its classes, the loss and the inputs refer to. If its code
    keeps a tensor elsewhere, in a global variable or a function with `functools.lru_cache`, a warning says so, because
    that tensor has no values.

    Args:
        model: Any module, in the mode (training or evaluation) to predict.
        inputs: Arguments of the model: real tensors, or tensors on the meta device.
        kwargs: Keyword arguments of the model.
        optimizer: Function that makes the optimizer from parameters, such as `torch.optim.AdamW` or
            `partial(torch.optim.SGD, lr=0.1, momentum=0.9)`, or an optimizer of the model, which is not changed. None
            counts no optimizer. Its state is counted as it is after the first step.
        loss: Function from the model's output to a scalar; None for the sum of all outputs that require a gradient.
        autocast: Data type in which autocast runs the forward pass and the loss, such as `torch.bfloat16`; None keeps
            the current setting.
        dtype: Predict as if the model and all floating-point inputs were converted to this data type.
        device: Predict as if model and inputs were on this device; None for the model's own, or the CPU if that is the
            meta device.
        step_in_backward: Count a step whose optimizer updates each parameter in the backward pass and frees its
            gradient, as under `revnet.optim.StepInBackward`. It needs `optimizer`.

    Raises:
        PredictionError: The model or the loss fails on inputs of these shapes, or needs the values of tensors.
        TypeError: An argument has the wrong type.
        ValueError: No output requires a gradient, a lazy module has no shape yet, `device` is not available, or
            `step_in_backward` has no optimizer.
    """
    with predicting(
        model,
        inputs,
        kwargs,
        optimizer=optimizer,
        loss=loss,
        autocast=autocast,
        dtype=dtype,
        device=device,
        step_in_backward=step_in_backward,
        short=find_short_steps(model),
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
    step_in_backward: bool = False,
    short: ShortSteps | None = None,
) -> Iterator["Prediction"]:
    """Replace the model's tensors by fake ones, for any number of steps; for the arguments see `predict`."""
    check_step(model, kwargs, loss, autocast)
    factory = as_factory(optimizer, list(model.parameters()))
    check_step_in_backward(step_in_backward, optimizer)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"`dtype` (={dtype!r}) must be a floating-point type such as `torch.bfloat16`, or None.")
    target = None if device is None else _checked_device("device", device)
    if target is None:
        _checked_device("model", device_of(model, inputs, kwargs))
    faker = TensorFaker(target, dtype)
    with checking_for_kept(model) as kept, ExitStack() as stack:
        stack.callback(lambda: kept.add(faker.release()))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(active_fake_mode() or FakeTensorMode(allow_non_fake_inputs=True))
        if torch.get_default_device().type == "meta":
            stack.enter_context(torch.device("cpu" if target is None else target))
        stack.enter_context(quiet())
        blocks = _BlocksToFake(stack, faker, short)
        prediction = Prediction(
            model,
            *tree_map_only(Tensor, faker.fake, (inputs, dict(kwargs or {}))),
            optimizer=factory,
            loss=loss,
            autocast=autocast,
            step_in_backward=step_in_backward,
            short=short,
            blocks=blocks,
            dtype=dtype,
            kept=kept,
        )
        stack.callback(prediction.close)
        stack.enter_context(fake_tensors_in(model, faker, blocks.left_out, [loss, *objects_in(inputs, kwargs)]))
        prediction.start()
        yield prediction


class _BlocksToFake:
    """The blocks whose tensors are replaced by fakes when they are needed."""

    def __init__(self, stack: ExitStack, faker: TensorFaker, short: ShortSteps | None):
        self._stack, self._faker = stack, faker
        self.left_out = {} if short is None else dict.fromkeys(short.blocks)

    def fake(self, blocks: Iterable[nn.Module]) -> None:
        """Replace the tensors of the blocks until the prediction ends."""
        for block in blocks:
            if block in self.left_out:
                del self.left_out[block]
                self._stack.enter_context(fake_tensors_in(block, self._faker))

    def fake_all(self) -> None:
        """Replace the tensors of all blocks until the prediction ends."""
        self.fake(list(self.left_out))


class Prediction:
    """A model with fake tensors, whose step can run any number of times under changing policies.

    Args:
        model: The model, with fake parameters and buffers.
        args: Positional arguments of the model, with fake tensors.
        kwargs: Keyword arguments of the model, with fake tensors.
        optimizer: Makes the optimizer; None counts no optimizer.
        loss: Function from the output to a scalar; None for the sum of all outputs.
        autocast: Data type of autocast; None keeps the current setting.
        step_in_backward: Whether the optimizer's step runs in the backward pass.
        short: Predicts the step from models with fewer blocks, as long as that is exact; None to run all blocks.
        blocks: The blocks that still have their own tensors.
        dtype: Data type to which floating-point tensors are converted; None to keep their own.
        kept: Watches the tensors that remain after a step.
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
        step_in_backward: bool,
        short: ShortSteps | None,
        blocks: _BlocksToFake,
        dtype: torch.dtype | None,
        kept: KeptFakes,
    ):
        self._model = model
        self._args = args
        self._kwargs = kwargs
        self._optimizer = optimizer
        self._loss = loss
        self._autocast = autocast
        self._dtype = dtype
        self._short, self._blocks = short, blocks
        self._cost: OptimizerCost | None = None
        self._modules: ModuleTable | None = None
        self._step_in_backward = step_in_backward and optimizer is not None
        self._in_backward: BackwardOptimizer | None = None
        self._num_fake = -1
        self._kept = kept

    def start(self) -> None:
        """Prepare the first step, when the tensors of the model are fake."""
        if self._short is None or self._short.is_refused:
            self._run_all_blocks()

    def close(self) -> None:
        """Release all tensors."""
        self._args, self._kwargs, self._in_backward = (), {}, None

    def run(self) -> StepResult:
        """Return a step of the model under its current policies.

        Raises:
            NotRepeatedError: Earlier results came from models with fewer blocks, and may be wrong.
        """
        if self._short is not None:
            try:
                return self._short.result(self._blocks.fake, self._run_model)
            except (NotRepeatedError, PredictionError, TypeError, ValueError):
                # The whole model runs, and reports an error that persists.
                has_results = self._short.has_results
                self._short.is_refused = True
                self._run_all_blocks()
                if has_results:
                    raise NotRepeatedError from None
        return self._run_model()

    def _run_all_blocks(self) -> None:
        """Run all blocks from now on."""
        self._short = None
        self._blocks.fake_all()
        self._prepare_optimizer()

    def _run_model(self) -> StepResult:
        """Run a step of the model as it is."""
        self._prepare_optimizer()
        for tensor in [*self._model.parameters(), *tensors_in(self._args, self._kwargs)]:
            tensor.grad = None
        in_backward = self._in_backward
        with restoring_host_random_states():
            return run_step(
                self._model,
                self._args,
                self._kwargs,
                loss=self._loss,
                autocast=self._autocast,
                guard=partial(_explained, self._model, describe_inputs(tensors_in(self._args, self._kwargs))),
                on_gradient=None if in_backward is None else in_backward.update,
                state=() if in_backward is None else in_backward.state,
                kept=self._kept.add,
            )

    def _prepare_optimizer(self) -> None:
        """Make the optimizer whose step runs in the backward pass, with the parameters that are fake now."""
        num_left_out = len(self._blocks.left_out)
        if not self._step_in_backward or num_left_out == self._num_fake:
            return
        assert self._optimizer is not None
        self._num_fake = num_left_out
        if self._short is None:
            self._in_backward = BackwardOptimizer(self._optimizer, list(self._model.parameters()))
            return
        stand_ins = self._short.stand_ins(is_own=lambda block: block not in self._blocks.left_out)
        # Each parameter is an object of its own, because an optimizer takes none twice.
        seen: set[nn.Parameter] = set()
        parameters = []
        for stand_in in stand_ins:
            parameters.append(nn.Parameter(stand_in.detach(), stand_in.requires_grad) if stand_in in seen else stand_in)
            seen.add(stand_in)
        self._in_backward = BackwardOptimizer(self._optimizer, parameters, stand_ins)
        if not self._in_backward.is_uniform:
            raise NotRepeatedError

    def memory(self) -> StepMemory:
        """Return the memory of a step of the model under its current policies."""
        result = self.run()
        if self._optimizer is not None and self._cost is None:  # it does not depend on policies
            self._cost = self._optimizer_cost(self._optimizer, result)
        if self._modules is None:
            self._modules = ModuleTable(self._model, self._dtype)
        return summarize(self._model, result, self._cost, modules=self._modules)

    def _optimizer_cost(self, optimizer: OptimizerFactory, result: StepResult) -> OptimizerCost:
        if self._in_backward is not None:
            return self._in_backward.cost(result.gradients, result.device_type)
        if self._short is None:
            return optimizer_cost(optimizer, list(self._model.parameters()), result.gradients, result.device_type)
        if self._short.optimizer_cost is None:
            arguments = optimizer, self._short.stand_ins(), result.gradients, result.device_type
            try:
                self._short.optimizer_cost = short_optimizer_cost(*arguments)
            except (NotRepeatedError, ValueError):  # The other function reports an error that persists.
                self._short.optimizer_cost = optimizer_cost(*arguments)
        return self._short.optimizer_cost


def _checked_device(name: str, value: torch.device | str) -> torch.device:
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"`{name}` (={value!r}) must be a device of PyTorch, such as 'cpu' or 'cuda'.") from error
    if device.type == "meta":
        return torch.device("cpu")
    if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_available()):
        raise ValueError(
            f"`{name}` (={device}) is on a device that PyTorch cannot use here; predict for the CPU with "
            "`device='cpu'`, where the bytes differ little."
        )
    return device


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the traces that PyTorch logs for errors on fake tensors; the exception says the same."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _explained(model: nn.Module, given: str, part: str, recorder: Recorder) -> Iterator[None]:
    """Turn an exception into one line that says what failed, where, and why."""
    try:
        yield
    except Exception as error:
        name = recorder.running_module
        where = f"`{name}` of {type(model).__name__}" if name else type(model).__name__
        cause = values_needed(error)
        if cause is None:
            raise PredictionError(
                f"{part} of {where} failed, {given}: {first_line(error)}{input_hint(error)}"
            ) from error
        raise PredictionError(
            f"{part} of {where} cannot be predicted, because {cause}; measure it with `revnet.memory.measure`, on a "
            "small batch."
        ) from error


_OTHER_INPUTS = {
    r"scalar ?type|dtype|Input type|tensors used as indices|not implemented for '": "; pass inputs of another dtype",
    r"index out of range in self": "; pass shorter inputs, or smaller numbers",
    r"(two|different|same) devices?\b": "; use `register_buffer` for tensors that a module keeps, or move the inputs",
}
"""Ways out of errors of PyTorch about the inputs, by a pattern of the message."""


def input_hint(error: BaseException) -> str:
    """Return the way out of an error of PyTorch about the inputs; empty for other errors."""
    text = str(error)
    if text.endswith("."):  # An error of this library, which ends with its own way out.
        return ""
    return next((hint for words, hint in _OTHER_INPUTS.items() if re.search(words, text, re.IGNORECASE)), "")


_NEEDS_DATA = ("FakeTensor", "fake", "data pointer", "tensor subclasses")


def values_needed(error: Exception) -> str | None:
    """Return the reason why only fake tensors raise this error; None if real tensors may raise it too."""
    if isinstance(error, DataDependentOutputException):
        return "it asks for the value of a tensor (`.item()`, `if x > 0`)"
    if isinstance(error, DynamicOutputShapeException):
        return f"a shape depends on values ({error.func})"
    if isinstance(error, UnsupportedOperatorException | UnsupportedFakeTensorException):
        return f"an operator has no shape function ({first_line(error)})"
    is_slip = isinstance(error, TypeError | AttributeError)  # its message only names the type of an operand
    if not is_slip and any(phrase in str(error) for phrase in _NEEDS_DATA):
        return f"it needs data ({first_line(error)})"
    return None


def describe_inputs(inputs: list[Tensor]) -> str:
    shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
    return f"on inputs of shape {shapes}" if shapes else "without inputs"


def first_line(error: Exception) -> str:
    line = next(iter(str(error).splitlines()), "").replace("FakeTensor", "Tensor")
    line = line if len(line) <= 200 else f"{line[:200]}..."
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
