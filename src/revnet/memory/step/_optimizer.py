"""Count the memory of an optimizer: its state, and the temporaries of a step."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from revnet._checks import describe
from revnet._torch_internals import DataDependentOutputException, FakeTensorMode, active_fake_mode
from revnet.memory.step._recorder import Recorder
from revnet.memory.step._run_step import tensors_in
from revnet.memory.step._step_log import Integers
from revnet.memory.step._storage_watch import StorageWatch

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
"""Function from parameters to an optimizer: `torch.optim.AdamW`, `partial(torch.optim.SGD, lr=0.1, momentum=0.9)`."""


@dataclass(frozen=True, eq=False)
class OptimizerCost:
    """Memory of an optimizer."""

    state_bytes: int
    step_bytes: Integers
    """Bytes alive after each operation of a step, in addition to parameters, gradients and state.

    Empty if the step runs in the backward pass, which then records them.
    """


def as_factory(
    optimizer: OptimizerFactory | Optimizer | None, parameters: Sequence[nn.Parameter]
) -> OptimizerFactory | None:
    """Return a function that makes the optimizer from parameters.

    Args:
        optimizer: Such a function, or an optimizer of the model; its class, options and parameter groups are used.
        parameters: Parameters of the model, in order.

    Raises:
        TypeError: `optimizer` is neither a function nor an optimizer.
        ValueError: `optimizer` holds a parameter that the model does not have.
    """
    if isinstance(optimizer, Optimizer):
        return _Copied(optimizer, parameters)
    if optimizer is not None and not callable(optimizer):
        raise TypeError(
            f"`optimizer` (={describe(optimizer)}) must be an optimizer of the model, or make one from parameters, "
            "such as `torch.optim.AdamW`."
        )
    return optimizer


class _Copied:
    """Makes a copy of an optimizer, with the same class, options and groups, for other parameters and without state."""

    def __init__(self, optimizer: Optimizer, parameters: Sequence[nn.Parameter]):
        index_of = {id(parameter): index for index, parameter in enumerate(parameters)}
        self.__name__ = type(optimizer).__name__
        self._class = type(optimizer)
        self._groups: list[tuple[list[int], dict[str, Any]]] = []
        for group in optimizer.param_groups:
            if any(id(parameter) not in index_of for parameter in group["params"]):
                raise ValueError(
                    f"`optimizer` (={self.__name__}) holds a parameter that `model` does not have; pass an optimizer "
                    f"of `model.parameters()`, or a function that makes one, such as `torch.optim.{self.__name__}`."
                )
            options = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            self._groups.append(([index_of[id(parameter)] for parameter in group["params"]], options))
        # `defaults` may hold more than the constructor takes: AdamW passes one of its own to Adam.
        accepted = inspect.signature(self._class).parameters
        self._defaults = {name: value for name, value in optimizer.defaults.items() if name in accepted}

    def __call__(self, parameters: list[nn.Parameter]) -> Optimizer:
        groups = [{**options, "params": [parameters[index] for index in indices]} for indices, options in self._groups]
        return self._class(groups, **self._defaults)


def optimizer_cost(
    factory: OptimizerFactory,
    parameters: Sequence[Tensor],
    gradients: Sequence[torch.layout | None],
    device_type: str,
) -> OptimizerCost:
    """Count the bytes of an optimizer from shapes alone, without touching the parameters.

    The step that is counted comes after the first one, which creates the state.

    Args:
        factory: Makes the optimizer.
        parameters: Parameters of the model, real or fake.
        gradients: Layout of the gradient of each parameter; None for one without.
        device_type: Type of the device on which bytes count.

    Raises:
        TypeError: `factory` does not make an optimizer.
        ValueError: The optimizer cannot be created, it cannot take a step on gradients alone, or it has state for a
            sparse gradient, since its step depends on the values then.
    """
    device_type = "cpu" if device_type == "meta" else device_type
    with fake_optimizer(device_type):
        fakes = [fake_parameter(*pair) for pair in zip(parameters, gradients, strict=True)]
        optimizer = make_optimizer(factory, fakes)
        with explained(factory, "cannot take a step on gradients alone"):
            optimizer.step()
        check_not_sparse(factory, [optimizer.state.get(fake) for fake in fakes], gradients)
        state = [tensor for tensor in tensors_in(list(optimizer.state.values())) if tensor.device.type == device_type]
        dense = [fake.grad for fake in fakes if fake.grad is not None and fake.grad.layout is torch.strided]
        recorder = Recorder(StorageWatch([*fakes, *dense, *state], device_type))
        with recorder:
            recorder.end_forward()
            optimizer.step()
            recorder.end()
    return OptimizerCost(storage_bytes(state), recorder.log().live_bytes)


@contextmanager
def fake_optimizer(device_type: str) -> Iterator[None]:
    """Let an optimizer be made and take steps on fake tensors, of which new ones are on a device of this type."""
    with ExitStack() as stack:
        # A rate may be a real tensor.
        stack.enter_context(active_fake_mode() or FakeTensorMode(allow_non_fake_inputs=True))
        if torch.get_default_device().type == "meta":
            stack.enter_context(torch.device(device_type))
        stack.enter_context(AnyValue())
        yield


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of tensors; a storage that tensors share counts once."""
    storages = {storage._cdata: storage.nbytes() for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storages.values())


def check_not_sparse(
    factory: OptimizerFactory, states: Iterable[Any], gradients: Sequence[torch.layout | None]
) -> None:
    """Raise if a parameter with a sparse gradient has a state."""
    if any(state and layout not in (None, torch.strided) for state, layout in zip(states, gradients, strict=True)):
        raise ValueError(
            f"`optimizer` (={_name_of(factory)}) keeps state for a parameter with a sparse gradient, so the memory of "
            "its step depends on the values of the inputs; make the gradient dense (`sparse=False` in an embedding), "
            "or leave the optimizer out (`optimizer=None`)."
        )


def fake_parameter(parameter: Tensor, gradient: torch.layout | None) -> nn.Parameter:
    """Return a fake of a parameter, with a gradient of a layout or without one."""
    device = "cpu" if parameter.is_meta else parameter.device
    data = torch.empty_strided(parameter.shape, parameter.stride(), dtype=parameter.dtype, device=device)
    fake = nn.Parameter(data, parameter.requires_grad)
    if gradient is torch.strided:
        fake.grad = torch.empty_like(data)
    elif gradient is not None:
        fake.grad = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device, layout=gradient)
    return fake


def make_optimizer(factory: OptimizerFactory, parameters: list[nn.Parameter]) -> Optimizer:
    """Make the optimizer of these parameters.

    Raises:
        TypeError: `factory` does not make an optimizer.
        ValueError: `factory` fails, or the optimizer has other parameters.
    """
    with explained(factory, "cannot be created"):
        optimizer = factory(parameters)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`optimizer` (={_name_of(factory)}) returned a {type(optimizer).__name__}; it must return a "
            "`torch.optim.Optimizer`."
        )
    ids = {id(parameter) for parameter in parameters}
    if any(id(parameter) not in ids for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"`optimizer` (={_name_of(factory)}) must make an optimizer of the parameters that it is called with; it "
            "used others."
        )
    return optimizer


@contextmanager
def explained(factory: OptimizerFactory, what: str) -> Iterator[None]:
    """Turn an exception into one line that names the optimizer."""
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"`optimizer` (={_name_of(factory)}) {what}: {type(error).__name__}: {reason}") from error


def _name_of(factory: Any) -> str:
    return _name_of(factory.func) if isinstance(factory, partial) else getattr(factory, "__name__", repr(factory))


class AnyValue(TorchDispatchMode):
    """Return 1 where an optimizer asks for the value of a fake tensor, as some do for a scalar factor."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, or return 1 if it needs the value of a tensor."""
        try:
            return func(*args, **(kwargs or {}))
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return 1.0 if args[0].is_floating_point() else 1
