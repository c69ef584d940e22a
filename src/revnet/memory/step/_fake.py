"""Replace the tensors of a model by fake ones, which have shapes and no data."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from revnet.errors import PredictionError
from revnet.memory.step._snapshot import Snapshot


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
            self._fakes[id(data)] = data, data
        return self._fakes[id(tensor)][1]

    def replace(self, value: Any) -> Any:
        """Return the fake of a tensor that has one or that is on the meta device, and of tensors in a tuple."""
        if isinstance(value, Tensor):
            if id(value) in self._fakes:
                return self._fakes[id(value)][1]
            # A tensor that a module keeps as a plain attribute is where the parameters are.
            is_meta = type(value) in (Tensor, nn.Parameter) and value.is_meta and value.layout is torch.strided
            return self.fake(value) if is_meta else value
        if isinstance(value, tuple):
            items = [self.replace(item) for item in value]
            if not all(map(is_, items, value)):
                return value._make(items) if hasattr(value, "_make") else tuple(items)
        return value

    def release(self) -> list[torch.UntypedStorage]:
        """Forget all fakes, and return their memory."""
        storages = [fake.untyped_storage() for _, fake in self._fakes.values()]
        self._fakes.clear()
        self._data.clear()
        return storages

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
def fake_tensors_in(
    model: nn.Module | None, faker: TensorFaker, without: Iterable[nn.Module] = (), values: Iterable[Any] = ()
) -> Iterator[None]:
    """Replace all parameters and buffers of `model` by fakes, except in the modules `without`; tied ones stay tied.

    On leaving, even by an exception, everything that the modules refer to is restored, so that fakes that a module
    stored in a cache, for instance, never meet real tensors.

    Args:
        model: The model; None for the values alone.
        faker: Makes the fakes.
        without: Modules that keep their tensors.
        values: Other values that the code of the model may change, such as the loss. What they refer to is restored,
            too; modules among them get fakes.
    """
    values = list(values)
    left_out = {module for block in without for module in block.modules()}
    faked = []
    for root in (model, *values):
        for name, module in root.named_modules() if isinstance(root, nn.Module) else ():
            if isinstance(module, torch.jit.ScriptModule):
                raise PredictionError(
                    f"`{name}` of {type(root).__name__} is TorchScript, which runs on real tensors only; use "
                    "`revnet.memory.measure`, which runs the model."
                )
            if module not in left_out:
                faked.append(module)
    snapshot = Snapshot(faked, values, without=left_out)
    try:
        for module in faked:
            holders: list[dict[str, Any]] = [module._parameters, module._buffers]
            for holder in holders:
                for name, tensor in holder.items():
                    if tensor is not None:
                        holder[name] = faker.fake(tensor)
        snapshot.replace(faker.replace)  # For instance the flat weights of recurrent layers.
        yield
    finally:
        snapshot.restore()
