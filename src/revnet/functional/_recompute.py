"""Running a residual function a second time exactly as it ran the first.

The backward pass runs every residual function again. To give the same numbers, and to leave no trace, it needs what the
forward pass saw: the random state, autocast, the training flags, the parameters (`torch.func.functional_call` swaps
them), and the buffers as they were before the function updated them. `Conditions` records these around the first call
and brings them back around the second; what cannot be brought back, because it was modified in place, raises.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from revnet.engine._batch_norm import (
    batch_norms_of,
    find_statistics,
    is_torch_norm,
    normalise,
    replaced,
    run_as_it_is,
)
from revnet.engine._random import bytes_of, get_random_state, same_random_state, set_random_state
from revnet.engine._restore import TensorPlace as Entry
from revnet.errors import ReconstructionError
from revnet.functional._storage import storage_key, version_of


class Conditions:
    """What one call of a residual function depends on, beside the stream.

    Made before the call, `settle`d after it, and entered again with `restored` for each recomputation.

    Args:
        function: The residual function, about to be called.
        x: The stream that it will be called with; None if all that it reads is among `arguments`.
        arguments: The tensors in its other arguments, which stay as they are until the last recomputation.
    """

    def __init__(self, function: nn.Module, x: Tensor | None, arguments: Sequence[Tensor]):
        self._training = [(module, module.training) for module in function.modules()]
        self._lasting: dict[int | None, Tensor] = {}
        self._versions: list[tuple[Tensor, int]] = []
        self._fixed: list[Entry] = []
        self._statistics: list[Entry] = []
        self._states: list[tuple[Entry, int, Tensor]] = []
        devices = {torch.device("cpu")}
        if x is not None:
            devices.add(x.device)

        for argument in arguments:
            self._add_constant(argument)
            devices.add(argument.device)
        for module, training in self._training:
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    if is_lazy(parameter):
                        raise ValueError(
                            f"`{name}` of {type(module).__name__} has no shape yet; call the residual function once, "
                            "under `torch.no_grad`, before it runs reversibly."
                        )
                    self._add_constant(parameter)
                    self._fixed.append(Entry(module._parameters, name, parameter))
                    devices.add(parameter.device)
            is_norm = is_torch_norm(module)
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                entry = Entry(module._buffers, name, buffer)
                if not is_norm:
                    self._add_lasting(buffer)
                    self._states.append((entry, version_of(buffer), buffer.detach().clone()))
                elif training:
                    self._add_lasting(buffer)
                    self._statistics.append(entry)
                else:
                    self._add_constant(buffer)
                    self._fixed.append(entry)

        # A stream that is an argument too does not outlive the call as a stream: it will be rebuilt elsewhere.
        if x is not None:
            self._lasting.pop(storage_key(x), None)
        self._random_ends: list[int] = []
        self._autocast = _autocast_states({device.type for device in devices})
        is_mixed = any(state.enabled for state in self._autocast)
        # Low precision turns a difference in the last place into one that counts.
        self._norms = [] if is_mixed else batch_norms_of(function)
        self._norm_holders = {id(norm._buffers) for norm in self._norms}
        self._random = _random_states(device for device in devices if device.type != "meta")

    def settle(self) -> None:
        """Keep, after the call, only what the call turned out to need.

        Random states that did not move and buffers that did not change are dropped, so that a function without
        randomness or state costs no bytes.
        """
        self._random = [
            (device, state) for device, state in self._random if not same_random_state(state, get_random_state(device))
        ]
        self._random_ends = [digest(get_random_state(device)) for device, _ in self._random]
        changed = []
        for entry, version, before in self._states:
            if version_of(entry.tensor) != version or entry.current is not entry.tensor:
                changed.append((entry, version, before))
            elif entry.tensor.dim() <= 1:
                # Kernels that keep running statistics write to them without raising their version: no vector is trusted
                # to be constant. Large buffers (masks, position tables) are.
                changed.append((entry, version, before))
            else:
                self._versions.append((entry.tensor, version))
                self._fixed.append(entry)
        self._states = changed

    def watch(self, tensor: Tensor, version: int) -> None:
        """Let recomputations raise if `tensor` is not at `version`."""
        self._versions.append((tensor, version))

    def may_be_cast(self, tensor: Tensor) -> bool:
        """Whether `tensor` can be what autocast made of a parameter."""
        return any(state.enabled and state.dtype == tensor.dtype for state in self._autocast)

    def is_lasting(self, tensor: Tensor) -> bool:
        """Whether `tensor` is (a view of) a parameter, a buffer or an argument: it outlives the call anyway."""
        return storage_key(tensor) in self._lasting

    @contextmanager
    def restored(self, is_rounded: bool = False) -> Iterator[None]:
        """Everything as the first call saw it; on leaving, everything as it was on entering.

        Args:
            is_rounded: Whether the function's input carries the rounding of a reconstruction already, so that its batch
                norms may find their statistics in a faster way that rounds differently.

        Raises:
            ReconstructionError: A parameter, buffer or argument was modified in place since the first call, or random
                numbers were drawn that the first call did not draw.
        """
        for tensor, version in self._versions:
            if version_of(tensor) != version:
                raise ReconstructionError(
                    f"a parameter, buffer or argument of shape {tuple(tensor.shape)} was modified in place after the "
                    f"forward pass (version {version_of(tensor)}, expected {version}), so the activations cannot be "
                    "rebuilt; run `backward` before modifying it, for instance before `optimizer.step()`."
                )
        lasting = dict(self._lasting)
        with ExitStack() as stack:
            stack.callback(setattr, self, "_lasting", lasting)
            for context in self._autocast_contexts():
                stack.enter_context(context)
            for module, training in self._training:
                if module.training != training:
                    stack.callback(setattr, module, "training", module.training)
                    module.training = training
            for entry in self._fixed:
                if entry.current is not entry.tensor and not _is_sharded(entry.tensor):
                    stack.callback(entry.swap(entry.tensor))
            for entry, _, before in self._states:
                stack.callback(self._swap_copy(entry, before))
            is_replacing = is_rounded and bool(self._norms)
            for entry in self._statistics:
                if not (is_replacing and id(entry.holder) in self._norm_holders):  # see `_run_again`
                    stack.callback(self._swap_copy(entry, entry.tensor))
            for device, state in self._random:
                stack.callback(set_random_state, device, get_random_state(device))
                set_random_state(device, state)
            if is_replacing:
                stack.enter_context(replaced(self._norms, self._run_again))
            yield
            for (device, _), end in zip(self._random, self._random_ends, strict=False):  # none unless settled
                if digest(get_random_state(device)) != end:
                    raise ReconstructionError(
                        "a residual function did not draw the random numbers again that it drew in the forward pass, "
                        f"on {device}: another thread drew from the same generator meanwhile, or the function is not "
                        "deterministic; train in separate processes, or keep its block's activations with `Store()`."
                    )

    def _add_lasting(self, tensor: Tensor) -> None:
        key = storage_key(tensor)
        if key is not None:
            self._lasting[key] = tensor

    def _add_constant(self, tensor: Tensor) -> None:
        self._add_lasting(tensor)
        self._versions.append((tensor, version_of(tensor)))

    def _swap_copy(self, entry: "Entry", value: Tensor) -> Callable[[], None]:
        copy = value.detach().clone()
        self._add_lasting(copy)
        return entry.swap(copy)

    def _run_again(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Call a batch norm without touching its statistics."""
        if not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()):
            statistics = find_statistics(x)
            if statistics is not None:
                return normalise(norm, x, statistics)
        entries = [entry for entry in self._statistics if entry.holder is norm._buffers]
        with ExitStack() as stack:
            for entry in entries:
                stack.callback(self._swap_copy(entry, entry.tensor))
            return run_as_it_is(norm, x)

    def _autocast_contexts(self) -> list[AbstractContextManager[Any]]:
        now = _autocast_states(state.device_type for state in self._autocast)
        return [
            torch.autocast(then.device_type, then.dtype, then.enabled, then.cache_enabled)
            for then, current in zip(self._autocast, now, strict=True)
            if then.enabled or current.enabled
        ]


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors in a call's arguments, however deep."""
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)] if args or kwargs else []


def digest(state: Tensor) -> int:
    """A number for a random state."""
    return hash(bytes_of(state))


class _AutocastState(NamedTuple):
    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache_enabled: bool


def _autocast_states(device_types: Iterable[str]) -> list[_AutocastState]:
    return [
        _AutocastState(
            device_type,
            torch.is_autocast_enabled(device_type),
            torch.get_autocast_dtype(device_type),
            torch.is_autocast_cache_enabled(),
        )
        for device_type in device_types
        if torch.amp.is_autocast_available(device_type)
    ]


def _random_states(devices: Iterable[torch.device]) -> list[tuple[torch.device, Tensor]]:
    return [(device, get_random_state(device)) for device in devices]


def _is_sharded(parameter: Tensor) -> bool:
    """Whether FSDP manages the parameter: it swaps whole and sharded forms itself, in recomputations too."""
    return hasattr(parameter, "device_mesh")
