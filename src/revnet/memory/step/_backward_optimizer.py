"""An optimizer whose step runs within the recorded backward pass."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from revnet._checks import check_bool
from revnet._torch_internals import active_fake_mode
from revnet.memory.step._optimizer import (
    AnyValue,
    OptimizerCost,
    OptimizerFactory,
    check_not_sparse,
    explained,
    make_optimizer,
    storage_bytes,
)
from revnet.memory.step._run_step import tensors_in
from revnet.optim._step_in_backward import check_optimizer
from revnet.optim._update import update_parameter


class BackwardOptimizer:
    """Updates each parameter when its gradient is complete, as `StepInBackward` does.

    Its state is as after the first step. Creating it changes the parameters, if they are real.

    Args:
        factory: Makes the optimizer.
        parameters: Parameters of the model, real or fake.
        stand_ins: For each parameter one that is treated like it, which may be itself. Only these get updates.

    Raises:
        TypeError: `factory` does not make an optimizer.
        ValueError: The optimizer cannot be created, or it cannot update one parameter at a time.
    """

    def __init__(
        self,
        factory: OptimizerFactory,
        parameters: Sequence[nn.Parameter],
        stand_ins: Sequence[nn.Parameter] | None = None,
    ):
        self._factory = factory
        self._stand_ins = parameters if stand_ins is None else stand_ins
        stand_in_of = dict(zip(parameters, self._stand_ins, strict=True))
        self._is_fake = active_fake_mode() is not None
        self._optimizer = make_optimizer(factory, list(parameters))
        check_optimizer(self._optimizer)
        self._group_of = {
            parameter: index
            for index, group in enumerate(self._optimizer.param_groups)
            for parameter in group["params"]
        }
        self.is_uniform = all(
            self._group_of.get(parameter) == self._group_of.get(other) for parameter, other in stand_in_of.items()
        )
        """Whether each parameter is in the group of its stand-in."""
        for parameter in self._group_of:
            if parameter.requires_grad and stand_in_of[parameter] is parameter:
                parameter.grad = torch.zeros_like(parameter)
                self.update(parameter)

    def update(self, parameter: Tensor) -> None:
        """Update a parameter and free its gradient; a parameter that the optimizer does not have keeps it."""
        if parameter in self._group_of:
            values = AnyValue() if self._is_fake else nullcontext()
            with values, explained(self._factory, "cannot step in a backward pass"):
                update_parameter(self._optimizer, self._group_of[parameter], parameter)
            parameter.grad = None

    @property
    def state(self) -> list[Tensor]:
        """Tensors of the state of all parameters."""
        return tensors_in(list(self._optimizer.state.values()))

    def cost(self, gradients: Sequence[torch.layout | None], device_type: str) -> OptimizerCost:
        """Return the memory of the optimizer; the temporaries of its step are part of the backward pass.

        Args:
            gradients: Layout of the gradient that each parameter received; None without one, which gets
                no state either.
            device_type: Type of the device on which bytes count.

        Raises:
            ValueError: The optimizer has state for a sparse gradient.
        """
        check_not_sparse(
            self._factory, [self._optimizer.state.get(parameter) for parameter in self._stand_ins], gradients
        )
        trained = [
            parameter for parameter, layout in zip(self._stand_ins, gradients, strict=True) if layout is not None
        ]
        states = {
            parameter: [
                tensor
                for tensor in tensors_in(self._optimizer.state.get(parameter))
                if tensor.device.type == device_type
            ]
            for parameter in trained
        }
        state_bytes = storage_bytes(tensor for state in states.values() for tensor in state)
        for parameter, count in Counter(trained).items():
            state_bytes += (count - 1) * storage_bytes(states[parameter])
        return OptimizerCost(state_bytes, np.zeros(0, np.int64))


def check_step_in_backward(step_in_backward: bool, optimizer: OptimizerFactory | Optimizer | None) -> None:
    """Raise unless `step_in_backward` is a bool that goes with `optimizer`."""
    check_bool(step_in_backward=step_in_backward)
    if step_in_backward and optimizer is None:
        raise ValueError(
            "`step_in_backward` needs `optimizer` (=None); pass the optimizer whose step runs in the backward pass."
        )


@contextmanager
def restoring_values(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Restore the values of the parameters on exit. The copies are in host memory."""
    copies = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, copy in zip(parameters, copies, strict=True):
                parameter.copy_(copy)
