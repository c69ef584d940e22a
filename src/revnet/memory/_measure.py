"""Bytes of one training step, counted exactly."""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class StepMemory:
    """What one training step needed beyond the model, its gradients and its input."""

    peak_bytes: int
    """Most bytes alive at once during the forward and backward pass."""
    held_bytes: int
    """Bytes alive between the forward and the backward pass: what autograd, and the output, hold."""


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensor storages that are created while this mode is active, as they come and go.

    A storage counts from the operation that returns it until it is freed, once however many tensors view it. What
    kernels allocate and free inside one operation (workspaces) is not seen.

    Args:
        ignore: Tensors whose storages do not count: parameters, inputs.
    """

    def __init__(self, ignore: Iterable[Tensor] = ()):
        super().__init__()
        # Kept alive, so that no counted storage can take the place of an ignored one.
        self._ignored = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in ignore)}
        self._watched: dict[int, weakref.ref[Any]] = {}
        self.live_bytes = 0
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and watch what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                self._watch(leaf.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._ignored or key in self._watched:
            return

        def freed(_: Any) -> None:
            self.live_bytes -= size
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, freed)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


def measure(model: nn.Module, *inputs: Any) -> StepMemory:
    """Run one training step of `model` and count the bytes that it needs.

    The step is `model(*inputs)`, the sum of all outputs as the loss, and `backward`. The model is left as it was:
    gradients, buffers and the random state are put back. Gradients count as part of the model, so they are allocated
    beforehand.

    Args:
        model: Any module, in the mode (training or evaluation) in which it shall be measured.
        inputs: Its arguments, tensors on the model's device.

    Returns:
        The bytes, exact on CPU up to what kernels use internally.

    Raises:
        ValueError: No output depends on anything that requires a gradient.
    """
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {parameter.device for parameter in parameters if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices=devices):
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            return _measure_step(model, inputs)
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _measure_step(model: nn.Module, inputs: tuple[Any, ...]) -> StepMemory:
    ignore = [*model.parameters(), *model.buffers()]
    ignore += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    ignore += [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    with torch.enable_grad(), LiveBytes(ignore) as counter:
        outputs = [leaf for leaf in tree_leaves(model(*inputs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        losses = [output.sum() for output in outputs]
        del outputs  # A training step does not hold on to them either.
        if not losses:
            raise ValueError(
                f"`model` (={type(model).__name__}) has no output that requires a gradient, so it has no training "
                "step; unfreeze a parameter."
            )
        held_bytes = counter.live_bytes
        torch.autograd.backward(losses)
    return StepMemory(peak_bytes=counter.peak_bytes, held_bytes=held_bytes)


def format_bytes(num_bytes: int) -> str:
    """Write a number of bytes for reading: "3.2 MiB"."""
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if abs(value) < 1024:
            return f"{num_bytes} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.2f} GiB"
