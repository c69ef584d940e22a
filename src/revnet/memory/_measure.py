"""The memory of a training step, measured by running one."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from revnet.memory._optimizer import OptimizerFactory, as_factory, optimizer_cost
from revnet.memory._step import Loss, check_step, device_of, run_step
from revnet.memory._step_memory import CudaMemory, StepMemory
from revnet.memory._summary import summarise
from revnet.nn._restore import restoring_state


def measure(
    model: nn.Module,
    *inputs: Any,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: OptimizerFactory | Optimizer | None = None,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
) -> StepMemory:
    """Run one training step of `model` and count the bytes that it needs.

    The step is `model(*inputs)`, the loss and `backward`, from parameters without gradients, as after
    `optimizer.zero_grad()`. The model is left as it was: gradients, buffers and the random state are put back, and no
    weight changes, for an optimizer's state and step are counted by shapes alone. `predict` gives the same figures
    without running anything.

    Args:
        model: Any module, in the mode (training or evaluation) in which it shall be measured.
        inputs: Its arguments, with tensors on the model's device.
        kwargs: Its keyword arguments.
        optimizer: Makes the optimizer from parameters: `torch.optim.AdamW`, or
            `partial(torch.optim.SGD, lr=0.1, momentum=0.9)`. An optimizer of the model is accepted too. It is not
            changed. None counts no optimizer. The step that is counted comes after the first, when the optimizer has
            its state.
        loss: From the model's output to a scalar; None for the sum of all outputs that require a gradient.
        autocast: The lower precision under which the forward pass and the loss run, such as `torch.bfloat16`; None for
            what is in force.

    Returns:
        The bytes, exact on CPU up to what kernels use internally; on a GPU also what its allocator said.

    Raises:
        TypeError: An argument is of another kind than said above.
        ValueError: No output depends on anything that requires a gradient, or a lazy module has no shape yet.
    """
    check_step(model, kwargs, loss, autocast)
    factory = as_factory(optimizer, list(model.parameters()))
    device = device_of(model, inputs, kwargs)
    if autocast is not None and not torch.amp.is_autocast_available(device.type):
        raise ValueError(
            f"`autocast` (={autocast}) is not possible on the {device.type} device; use `revnet.memory.predict`, which "
            "needs no data either."
        )
    parameters = list(model.parameters())
    leaf_of = _leaves_except(parameters)
    with torch.inference_mode(False), restoring_state(model), ExitStack() as stack:
        if device.type == "cuda":
            cuda = stack.enter_context(_watching_cuda(device))
        args, named = tree_map_only(Tensor, leaf_of, (inputs, dict(kwargs or {})))
        result = run_step(model, args, named, loss=loss, autocast=autocast)
    cost = None
    if factory is not None:
        cost = optimizer_cost(factory, parameters, result.has_gradient, device.type)
    return summarise(model, result, cost, cuda() if device.type == "cuda" else None)


def _leaves_except(parameters: list[nn.Parameter]) -> Callable[[Tensor], Tensor]:
    """A function that gives the same memory as a leaf of its own, so that no gradient reaches what is the caller's."""
    leaves: dict[int, Tensor] = {id(parameter): parameter for parameter in parameters}

    def leaf_of(tensor: Tensor) -> Tensor:
        if id(tensor) not in leaves:
            leaves[id(tensor)] = tensor.detach().requires_grad_(tensor.requires_grad)
        return leaves[id(tensor)]

    return leaf_of


@contextmanager
def _watching_cuda(device: torch.device) -> Iterator[Callable[[], CudaMemory]]:
    """Gives what the GPU says, to be asked afterwards."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    seen: list[CudaMemory] = []
    yield seen.pop
    torch.cuda.synchronize(device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    seen.append(CudaMemory(allocated, reserved, total_bytes - free_bytes))
