"""Measure the memory of a training step by running one."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from revnet.memory.step._backward_optimizer import BackwardOptimizer, check_step_in_backward, restoring_values
from revnet.memory.step._memory_parts import CudaMemory
from revnet.memory.step._optimizer import OptimizerFactory, as_factory, optimizer_cost
from revnet.memory.step._run_step import Loss, check_step, device_of, run_step
from revnet.memory.step._step_memory import StepMemory
from revnet.memory.step._summarize import summarize
from revnet.nn._restore import restoring_state


def measure(
    model: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: OptimizerFactory | Optimizer | None = None,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    step_in_backward: bool = False,
) -> StepMemory:
    """Run one training step of `model` and count the bytes that it needs.

    The step runs `model(*inputs)`, the loss and `backward`, from parameters without gradients, as after
    `optimizer.zero_grad()`. The model is left unchanged: gradients, buffers and the random state are restored, and the
    optimizer does not run; its state and step are counted from shapes alone. With `step_in_backward`, a copy of the
    optimizer does run, and the parameters are restored, too. `predict` returns the same figures without running the
    step.

    Args:
        model: Any module, in the mode (training or evaluation) to measure.
        inputs: Arguments of the model, with tensors on its device.
        kwargs: Keyword arguments of the model.
        optimizer: Function that makes the optimizer from parameters, such as `torch.optim.AdamW` or
            `partial(torch.optim.SGD, lr=0.1, momentum=0.9)`, or an optimizer of the model, which is not changed. None
            counts no optimizer. Its state is counted as it is after the first step.
        loss: Function from the model's output to a scalar; None for the sum of all outputs that require a gradient.
        autocast: Data type in which autocast runs the forward pass and the loss, such as `torch.bfloat16`; None keeps
            the current setting.
        step_in_backward: Run a step whose optimizer updates each parameter in the backward pass and frees its gradient,
            as under `revnet.optim.StepInBackward`. It needs `optimizer`.

    Returns:
        The memory of the step. On the CPU it is exact, apart from workspaces within kernels; on a GPU it also has the
            figures of the allocator.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: No output requires a gradient, a lazy module has no shape yet, or `step_in_backward` has no
            optimizer.
    """
    check_step(model, kwargs, loss, autocast)
    parameters = list(model.parameters())
    factory = as_factory(optimizer, parameters)
    check_step_in_backward(step_in_backward, optimizer)
    device = device_of(model, inputs, kwargs)
    if autocast is not None and not torch.amp.is_autocast_available(device.type):
        raise ValueError(
            f"`autocast` (={autocast}) is not possible on the {device.type} device; use `revnet.memory.predict`, which "
            "needs no data."
        )
    leaf_of = _leaves_except(parameters)
    in_backward = None
    with torch.inference_mode(False), restoring_state(model), ExitStack() as stack:
        if step_in_backward and factory is not None:
            stack.enter_context(restoring_values(parameters))
            in_backward = BackwardOptimizer(factory, parameters)
        if device.type == "cuda":
            cuda = stack.enter_context(_watching_cuda(device))
        args, keywords = tree_map_only(Tensor, leaf_of, (inputs, dict(kwargs or {})))
        result = run_step(
            model,
            args,
            keywords,
            loss=loss,
            autocast=autocast,
            on_gradient=None if in_backward is None else in_backward.update,
            state=() if in_backward is None else in_backward.state,
        )
    cost = None
    if in_backward is not None:
        cost = in_backward.cost(result.gradients, device.type)
    elif factory is not None:
        cost = optimizer_cost(factory, parameters, result.gradients, device.type)
    return summarize(model, result, cost, cuda() if device.type == "cuda" else None)


def _leaves_except(parameters: list[nn.Parameter]) -> Callable[[Tensor], Tensor]:
    """Return a function that makes a leaf over the same memory, so that no gradient reaches the caller's tensors."""
    leaves: dict[int, Tensor] = {id(parameter): parameter for parameter in parameters}

    def leaf_of(tensor: Tensor) -> Tensor:
        if id(tensor) not in leaves:
            leaves[id(tensor)] = tensor.detach().requires_grad_(tensor.requires_grad)
        return leaves[id(tensor)]

    return leaf_of


@contextmanager
def _watching_cuda(device: torch.device) -> Iterator[Callable[[], CudaMemory]]:
    """Watch the GPU's memory; the function that is yielded returns the figures after leaving."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    figures: list[CudaMemory] = []
    yield figures.pop
    torch.cuda.synchronize(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    figures.append(CudaMemory(allocated, reserved, total_bytes - free_bytes))
