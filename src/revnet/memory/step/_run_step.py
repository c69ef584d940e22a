"""Run one training step under a recorder."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from revnet._checks import check_step_arguments
from revnet._model_output import explain_no_gradient, leaves_of_output
from revnet._torch_internals import FakeTensor, active_fake_mode
from revnet.errors import PredictionError
from revnet.memory.step._cpu_kernels import CpuKernels
from revnet.memory.step._recorder import Recorder
from revnet.memory.step._step_log import StepLog
from revnet.memory.step._storage_watch import StorageWatch

Loss = Callable[[Any], Tensor]
"""Function from a model's output to a scalar."""


class Constants(NamedTuple):
    """Bytes that are alive during the whole step."""

    parameters: int
    buffers: int
    inputs: int


@dataclass(frozen=True, eq=False)
class StepResult:
    """Record of one step."""

    log: StepLog
    constants: Constants
    gradients: list[torch.layout | None]
    """Layout of the gradient that the step gave to each parameter of the model, in order; None without one."""
    device_type: str
    """Type of the device on which bytes count."""


def _unguarded(what: str, recorder: Recorder) -> AbstractContextManager[None]:
    return nullcontext()


def run_step(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    loss: Loss | None,
    autocast: torch.dtype | None,
    guard: Callable[[str, Recorder], AbstractContextManager[None]] = _unguarded,
    on_gradient: Callable[[Tensor], None] | None = None,
    state: Sequence[Tensor] = (),
    kept: Callable[[list[torch.UntypedStorage]], None] | None = None,
) -> StepResult:
    """Run `model(*args, **kwargs)`, the loss and `backward`, and record them.

    The parameters must have no gradients, so that the backward pass creates them. They keep the new gradients.

    Args:
        model: The model, with real or fake parameters.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        loss: Function from the output to a scalar; None for the sum of all outputs that require a gradient.
        autocast: Data type in which autocast runs the forward pass and the loss; None keeps the current setting.
        guard: Makes a context for each part that runs code of the user, from the name of the part ("the forward pass",
            "the loss", "the backward pass") and the recorder.
        on_gradient: Called with each parameter when its gradient is complete, such as the step of an optimizer. Its
            allocations count, and its time does not.
        state: Other tensors that are alive during the whole step, which do not count, such as an optimizer's state.
        kept: Called at the end with the storages that are still alive.

    Raises:
        PredictionError: The tensors are real, but the output is fake, from a tensor that a prediction left behind.
        TypeError: `loss` did not return a scalar.
        ValueError: Neither the loss nor any output requires a gradient.
    """
    device_type = device_of(model, args, kwargs).type
    parameters, buffers = list(model.parameters()), list(model.buffers())
    inputs = tensors_in(args, kwargs)
    recorder = Recorder(StorageWatch([*parameters, *buffers, *inputs, *state], device_type, kept))
    constants = Constants(*bytes_by_group([parameters, buffers, inputs], device_type))
    torch.clear_autocast_cache()  # casts cached by earlier code would not be counted
    is_real = device_type != "meta" and active_fake_mode() is None
    kernels = nullcontext() if is_real else CpuKernels()
    # The hooks of `following` come first, so that the recorder sees each gradient before `on_gradient` frees it.
    calling = _calling_on_gradients(parameters, on_gradient, recorder)
    with torch.enable_grad(), recorder.following(model), calling as received, kernels, recorder:
        with nullcontext() if autocast is None else torch.autocast(device_type, autocast):
            with guard("the forward pass", recorder), recorder.calling(model):
                output = model(*args, **kwargs)
            with guard("the loss", recorder):
                losses = losses_of(output, loss)
            fault = None if losses else explain_no_gradient(model, output)
            del output  # a training step does not keep it either
        check_losses(model, losses, is_given=loss is not None, fault=fault)
        if active_fake_mode() is None and any(issubclass(type(value), FakeTensor) for value in losses):
            raise PredictionError(
                f"the output of `model` (={type(model).__name__}) has no values, because its code uses a tensor of an "
                "earlier prediction; clear the global variable or the cache (`cache_clear()`) that keeps it."
            )
        recorder.end_forward()
        with _restoring_gradients(_other_leaves(losses, [*parameters, *inputs])), guard("the backward pass", recorder):
            torch.autograd.backward(losses)
        recorder.end()
    torch.clear_autocast_cache()
    gradients = [
        received.get(parameter) if parameter.grad is None else parameter.grad.layout for parameter in parameters
    ]
    return StepResult(recorder.log(), constants, gradients, device_type)


@contextmanager
def _calling_on_gradients(
    parameters: Iterable[nn.Parameter], on_gradient: Callable[[Tensor], None] | None, recorder: Recorder
) -> Iterator[dict[Tensor, torch.layout]]:
    """Call `on_gradient` with each parameter that receives a gradient; yield the layouts of these gradients."""
    received: dict[Tensor, torch.layout] = {}

    def hook(parameter: Tensor) -> None:
        assert on_gradient is not None
        if parameter.grad is not None:
            received[parameter] = parameter.grad.layout
        recorder.counts_costs = False
        on_gradient(parameter)
        recorder.counts_costs = True

    with ExitStack() as stack:
        for parameter in parameters:
            if parameter.requires_grad and on_gradient is not None:
                stack.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
        yield received


def losses_of(output: Any, loss: Loss | None) -> list[Tensor]:
    """Return the scalars to differentiate: the loss, or the sum of each output that requires a gradient."""
    if loss is not None:
        return [loss(output)]
    outputs = [leaf for leaf in leaves_of_output(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return [(torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf).sum() for leaf in outputs]


def check_losses(model: nn.Module, losses: list[Tensor], *, is_given: bool, fault: str | None = None) -> None:
    """Raise unless the losses are scalars that can be differentiated.

    Args:
        model: The model.
        losses: The loss, or the sum of each output.
        is_given: Whether the user gave the loss.
        fault: Why the output has nothing to differentiate, if there are no losses.
    """
    for value in losses:
        if not isinstance(value, Tensor) or value.numel() != 1:
            returned = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"`loss` returned {returned}; it must return a scalar tensor: take the mean or the sum.")
    if is_given and not losses[0].requires_grad:
        raise ValueError(
            f"`loss` of `model` (={type(model).__name__}) returned a tensor that requires no gradient, so nothing can "
            "be trained; unfreeze a parameter, and do not detach the output."
        )
    if fault is not None:
        raise ValueError(fault)


def _other_leaves(losses: list[Tensor], known: list[Tensor]) -> list[Tensor]:
    """Return the leaves outside the model that will receive gradients, such as parameters of the loss."""
    ids = {id(tensor) for tensor in known}
    nodes: list[Any] = [loss.grad_fn for loss in losses]
    seen, leaves = set(nodes), []
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if node.name() == "torch::autograd::AccumulateGrad" and id(node.variable) not in ids:
            leaves.append(node.variable)
        for parent, _ in node.next_functions:
            if parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    return leaves


@contextmanager
def _restoring_gradients(leaves: list[Tensor]) -> Iterator[None]:
    """Remove the gradients of the leaves and restore them on exit."""
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    try:
        yield
    finally:
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient


# Arguments ------------------------------------------------------------------------------------------------------------


def check_step(
    model: nn.Module, kwargs: Mapping[str, Any] | None, loss: Loss | None, autocast: torch.dtype | None
) -> None:
    """Raise for arguments that are invalid in any step, before anything runs."""
    check_step_arguments(model, kwargs, loss, autocast)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise ValueError(
                f"`model` (={type(model).__name__}) has no shape yet for `{name}`; call it once on a batch, which "
                "initializes its lazy modules."
            )


def device_of(model: nn.Module, *inputs: Any) -> torch.device:
    """Return the device of the model; of several devices, the first that is not the CPU."""
    tensors = [*model.parameters(), *model.buffers()] or tensors_in(inputs)
    devices = [tensor.device for tensor in tensors]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def tensors_in(*values: Any) -> list[Tensor]:
    """Return the tensors in nested structures."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def objects_in(*values: Any) -> list[Any]:
    """Return what is in nested structures, except tensors: objects that a model may change."""
    return [leaf for leaf in tree_leaves(values) if not isinstance(leaf, Tensor)]


def bytes_by_group(groups: Iterable[Iterable[Tensor]], device_type: str) -> list[int]:
    """Return the bytes of each group of tensors; memory that tensors share counts once, for the first of them."""
    seen: set[tuple[Any, ...]] = set()
    totals = []
    for group in groups:
        total = 0
        for tensor in group:
            if tensor.layout is torch.strided and tensor.device.type == device_type:
                storage = tensor.untyped_storage()
                key = storage._cdata, tensor.storage_offset(), tensor.shape
                if key not in seen:
                    seen.add(key)
                    # A slice of a data set counts alone, without its storage; an expanded tensor counts its storage.
                    total += min(storage.nbytes(), tensor.numel() * tensor.element_size())
        totals.append(total)
    return totals
