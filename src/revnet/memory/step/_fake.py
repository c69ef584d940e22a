"""Replace the tensors of a model by fake ones, which have shapes and no data."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from revnet.errors import PredictionError


class TensorFaker:
    """Makes fake tensors with the shapes of real ones, under a `FakeTensorMode`; the same tensor gives the same fake.

    Args:
        device: Device that the fakes report; None for the device of the real tensor, or the CPU for the meta device.
        dtype: Data type of the fakes of floating-point tensors; None to keep their own.
    """

    def __init__(self, device: torch.device | None, dtype: torch.dtype | None):
        self._device = device
        self._dtype = dtype
        self._fakes: dict[int, tuple[Tensor, Tensor]] = {}
        self._data: dict[tuple[Any, ...], Tensor] = {}

    def fake(self, tensor: Tensor) -> Tensor:
        """Return the fake of a tensor: a leaf, which requires a gradient if the tensor does."""
        if id(tensor) not in self._fakes:
            data = self._fake_data(tensor)
            if isinstance(tensor, nn.Parameter):
                data = nn.Parameter(data, tensor.requires_grad)
            elif tensor.requires_grad:
                data = data.detach().requires_grad_()
            self._fakes[id(tensor)] = tensor, data  # keeping the tensor keeps its id from being reused
        return self._fakes[id(tensor)][1]

    def replace_known(self, value: Any) -> Any:
        """Return `value` with each tensor that has a fake replaced by it, in lists, tuples and dicts too."""
        if isinstance(value, Tensor):
            return self._fakes[id(value)][1] if id(value) in self._fakes else value
        if type(value) in (list, tuple):
            items = [self.replace_known(item) for item in value]
            # The list may be shared, so return the same object unless it has changed.
            return value if all(map(is_, items, value)) else type(value)(items)
        if type(value) is dict:
            items = [self.replace_known(item) for item in value.values()]
            return value if all(map(is_, items, value.values())) else dict(zip(value, items, strict=True))
        return value

    def _fake_data(self, tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
            kind = type(tensor).__name__ if tensor.layout is torch.strided else f"tensor of layout {tensor.layout}"
            raise PredictionError(
                f"a {kind} of shape {tuple(tensor.shape)} cannot be predicted from its shape; use "
                "`revnet.memory.measure`, which runs the model."
            )
        device = self._device or (torch.device("cpu") if tensor.device.type == "meta" else tensor.device)
        dtype = tensor.dtype
        if self._dtype is not None and dtype.is_floating_point:
            dtype = self._dtype
        # Parameters that share their data still share it here; a conversion separates them.
        key = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()
        if dtype != tensor.dtype or key not in self._data:
            self._data[key] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
        return self._data[key]


@contextmanager
def fake_tensors_in(model: nn.Module, faker: TensorFaker, without: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Replace all parameters and buffers of `model` by fakes, except in the modules `without`; tied ones stay tied.

    On leaving, even by an exception, all attributes of every module are restored, so that fakes that a module stored
    in a cache, for instance, never meet real tensors.
    """
    left_out = {module for block in without for module in block.modules()}
    modules = {name: module for name, module in model.named_modules() if module not in left_out}
    for name, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise PredictionError(
                f"`{name}` of {type(model).__name__} is TorchScript, which runs on real tensors only; use "
                "`revnet.memory.measure`, which runs the model."
            )
    restores = [_save_attributes(module) for module in modules.values()]
    try:
        for module in modules.values():
            holders: list[dict[str, Any]] = [module._parameters, module._buffers]
            for holder in holders:
                for name, tensor in holder.items():
                    if tensor is not None:
                        holder[name] = faker.fake(tensor)
        for module in modules.values():
            for name, value in module.__dict__.items():
                if name not in _HOLDERS:
                    # For instance the flat weights of recurrent layers.
                    module.__dict__[name] = faker.replace_known(value)
        yield
    finally:
        for restore in restores:
            restore()


_HOLDERS = {"_parameters", "_buffers", "_modules"}


def _save_attributes(module: nn.Module) -> Callable[[], None]:
    """Save the attributes of a module, and what they contain; return a function to restore them."""
    attributes = dict(module.__dict__)
    saved: dict[int, tuple[Any, Any]] = {}
    _save_contents(attributes, saved)
    del saved[id(attributes)]

    def restore() -> None:
        for name in module.__dict__.keys() - attributes.keys():
            del module.__dict__[name]
        module.__dict__.update(attributes)
        for container, content in saved.values():
            container.clear()
            if isinstance(container, list | deque):
                container.extend(content)
            else:
                container.update(content)

    return restore


def _save_contents(value: Any, saved: dict[int, tuple[Any, Any]]) -> None:
    """Add copies of a list, deque, dict or set, and of those inside it, to `saved`."""
    if isinstance(value, list | deque | dict | set) and id(value) not in saved:
        saved[id(value)] = value, value.copy()
    elif not isinstance(value, tuple):
        return
    for content in list(value.values() if isinstance(value, dict) else value):
        if isinstance(content, list | deque | dict | set | tuple):
            _save_contents(content, saved)
