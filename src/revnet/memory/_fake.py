"""Fake tensors in the place of a model's own: shapes without data."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from revnet.errors import PredictionError


class Faker:
    """Makes fake tensors of the shapes of others, the same for the same; under a `FakeTensorMode`.

    Args:
        device: Where the fakes shall seem to be; None for where the others are, the CPU for those on the meta device.
        dtype: Of all fakes of floating-point tensors; None for their own.
    """

    def __init__(self, device: torch.device | None, dtype: torch.dtype | None):
        self._device = device
        self._dtype = dtype
        self._fakes: dict[int, tuple[Tensor, Tensor]] = {}
        self._data: dict[tuple[Any, ...], Tensor] = {}

    def fake(self, tensor: Tensor) -> Tensor:
        """The fake of a tensor, a leaf that requires a gradient if the tensor does."""
        if id(tensor) not in self._fakes:
            data = self._fake_data(tensor)
            if isinstance(tensor, nn.Parameter):
                data = nn.Parameter(data, tensor.requires_grad)
            elif tensor.requires_grad:
                data = data.detach().requires_grad_()
            self._fakes[id(tensor)] = tensor, data  # The tensor too, so that its id stays its own.
        return self._fakes[id(tensor)][1]

    def fake_known(self, value: Any) -> Any:
        """`value`, with fakes in the place of tensors that have one; in a list, a tuple or a dict too."""
        if isinstance(value, Tensor):
            return self._fakes[id(value)][1] if id(value) in self._fakes else value
        if type(value) in (list, tuple):
            items = [self.fake_known(each) for each in value]
            # Others may share a list: one without tensors stays what it is.
            return value if all(map(is_, items, value)) else type(value)(items)
        if type(value) is dict:
            items = [self.fake_known(each) for each in value.values()]
            return value if all(map(is_, items, value.values())) else dict(zip(value, items, strict=True))
        return value

    def _fake_data(self, tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided or is_traceable_wrapper_subclass(tensor):
            kind = type(tensor).__name__ if tensor.layout is torch.strided else f"tensor of layout {tensor.layout}"
            raise PredictionError(
                f"a {kind} of shape {tuple(tensor.shape)} cannot be predicted from its shape; measure the model for "
                "real with `revnet.memory.measure`."
            )
        device = self._device or (torch.device("cpu") if tensor.device.type == "meta" else tensor.device)
        dtype = tensor.dtype
        if self._dtype is not None and dtype.is_floating_point:
            dtype = self._dtype
        # Parameters that are tied by their data stay so, though conversion would part them.
        key = tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()
        if dtype != tensor.dtype or key not in self._data:
            self._data[key] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device=device)
        return self._data[key]


@contextmanager
def faked(model: nn.Module, faker: Faker) -> Iterator[None]:
    """Put fakes in the place of all parameters and buffers of `model`, tied ones tied.

    On leaving, whatever happened, every module has the attributes that it had: what it noted of fakes, in a cache
    perhaps, must not meet real tensors later.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise PredictionError(
                f"`{name}` of {type(model).__name__} is TorchScript, which runs on real tensors only; measure the "
                "model with `revnet.memory.measure`."
            )
    undo = [_attributes_of(module) for module in model.modules()]
    try:
        for module in model.modules():
            holders: list[dict[str, Any]] = [module._parameters, module._buffers]
            for holder in holders:
                for name, tensor in holder.items():
                    if tensor is not None:
                        holder[name] = faker.fake(tensor)
        for module in model.modules():
            for name, value in module.__dict__.items():
                if name not in _HOLDERS:
                    module.__dict__[name] = faker.fake_known(value)  # Such as the flat weights of recurrent layers.
        yield
    finally:
        for restore in undo:
            restore()


_HOLDERS = {"_parameters", "_buffers", "_modules"}


def _attributes_of(module: nn.Module) -> Callable[[], None]:
    """Note the attributes of a module, and what is in lists and dicts among them; returns the call that restores."""
    attributes = dict(module.__dict__)
    contents = {name: value.copy() for name, value in attributes.items() if isinstance(value, list | dict | set)}

    def restore() -> None:
        for name in module.__dict__.keys() - attributes.keys():
            del module.__dict__[name]
        module.__dict__.update(attributes)
        for name, content in contents.items():
            value = attributes[name]
            if isinstance(value, list):
                value[:] = content
            else:
                value.clear()
                value.update(content)

    return restore
