"""Put back the state that a function saw in its first run, if it has changed.

A replay first checks whether everything is unchanged (`replay`). Usually it is, and nothing in this file is called.
Otherwise, or if the function draws random numbers or keeps state in buffers, `restored` puts back each kind of state
for the time of the replay, and then sets it to its current value again.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from revnet._torch_internals import HAS_ACCELERATOR, in_functorch_transform
from revnet._torch_release import is_done_with_backward
from revnet.engine._arrays import SIZE, array_of, is_on_host, places
from revnet.engine._capture import check_same_graph, is_capturing
from revnet.engine._digest import has_memory
from revnet.engine._random import by_device, digest, get_random_state, set_random_state
from revnet.engine._tensors import is_sharded
from revnet.errors import ReconstructionError

if TYPE_CHECKING:
    from revnet.engine._record import RecordedCall


@dataclass(frozen=True, slots=True)
class AutocastState:
    """State of autocast on one type of device."""

    device_type: str
    enabled: bool
    dtype: torch.dtype
    cache_enabled: bool


def autocast_states(device_types: Iterable[str]) -> tuple[AutocastState, ...]:
    """Return the current state of autocast on these types of device, all of which support it."""
    cache_enabled = torch.is_autocast_cache_enabled()
    return tuple(
        [
            AutocastState(
                device_type,
                torch.is_autocast_enabled(device_type),
                torch.get_autocast_dtype(device_type),
                cache_enabled,
            )
            for device_type in device_types
        ]
    )


@dataclass(frozen=True, slots=True, eq=False)
class TensorPlace:
    """Place where a module holds one of its tensors, and the tensor that it held during the call."""

    holder: Any
    name: str
    tensor: Tensor

    @property
    def current(self) -> Any:
        """The tensor that is in this place now."""
        return self.holder.get(self.name)

    def swap(self, tensor: Tensor) -> Callable[[], None]:
        """Put `tensor` in this place, and return a function that undoes it."""
        is_there, before = self.name in self.holder, self.current
        # Into the dict, because a module's `setattr` rejects a plain tensor where a parameter is.
        self.holder[self.name] = tensor

        def undo() -> None:
            if is_there:
                self.holder[self.name] = before
            else:
                self.holder.pop(self.name, None)

        return undo


@contextmanager
def set_aside(call: "RecordedCall") -> Iterator[None]:
    """Run a function only for its result: undo its changes to buffers and random states."""
    # All buffers, because it is not known in advance which of them the function writes.
    call.states = {place: buffer.detach().clone() for place, buffer in enumerate(call.buffers)}
    devices = call.surroundings.devices | call.plan.devices
    # Without a digest of the state after, because the function need not repeat the numbers of another run.
    call.random = [(device, get_random_state(device), None) for device in devices]
    with restored(call):
        yield


@contextmanager
def restored(call: "RecordedCall") -> Iterator[set[int]]:
    """Put back everything that the function saw; on exit, set everything to its current value again.

    Yields:
        The identities of the tensors that outlive the call, including the copies that were put in.

    Raises:
        ReconstructionError: The replay did not draw the same random numbers as the first run, or cannot.
    """
    plan = call.plan
    lasting = set(call.lasting)
    if call.random and HAS_ACCELERATOR and is_capturing():
        check_same_graph(call.name, call.random, map(get_random_state, (device for device, _, _ in call.random)))
    with ExitStack() as stack:
        # A module that has nothing to rebuild runs again when its own backward pass is over. FSDP takes this for a part
        # of that pass, and does not shard the parameters again.
        for module in filter(is_done_with_backward, plan.sharded):
            stack.callback(module.reshard)
        for context in _autocast_contexts(call):
            stack.enter_context(context)
        # One by one: `train()` would set the flags of the children too, and models override it to keep a norm frozen.
        for holder, flag in zip(plan.modules, plan.training, strict=True):
            if holder.training != flag:
                stack.callback(setattr, holder, "training", holder.training)
                holder.training = flag
        for parameter, requires_grad in zip(call.parameters, call.requires_grad, strict=True):
            if parameter.requires_grad != requires_grad:
                stack.callback(parameter.requires_grad_, parameter.requires_grad)
                parameter.requires_grad_(requires_grad)
        # By the identity of the original, since a tensor in two places has one copy. Kept until the replay is over, so
        # that no other tensor takes the identity of a copy.
        copies: dict[int, Tensor] = {}
        for place, value in _places_to_fill(call):
            is_copied = value is not None
            # A tensor that the function writes to is copied even if it is still in place: the replay must not write to
            # it again.
            # FSDP swaps whole and sharded forms itself, also in replays.
            if not is_copied and (place.current is place.tensor or is_sharded(place.tensor)):
                continue
            tensor = copies.get(id(place.tensor), place.tensor)
            if value is not None and id(place.tensor) not in copies:
                tensor = value.detach().clone().requires_grad_(place.tensor.requires_grad)
                copies[id(place.tensor)] = tensor
                lasting.add(id(tensor))
            elif value is None and _is_freed(tensor):
                raise ReconstructionError(
                    f"`{call.name}` must run again, but FSDP has freed its `{place.name}`: the function saves "
                    "nothing of its own for the backward pass, and was sharded together with another one. Shard each "
                    'function by itself, as `shard_blocks(model, unit="function")` does, or store the activations of '
                    "its block with the policy `Store()`."
                )
            stack.callback(place.swap(tensor))
        # A function that left the states unchanged may have drawn nevertheless, and put them back itself.
        states = [(device, state) for device, state, _ in call.random or ()] or by_device(call.others, call.before)
        for device, state in states:
            stack.callback(set_random_state, device, get_random_state(device))
            set_random_state(device, state)
        yield lasting
        for device, _, end in call.random or ():
            # Compared here, because leaving the stack sets other states.
            if end is not None and digest(get_random_state(device)) != end:
                raise OtherNumbersError(
                    f"`{call.name}` did not draw the same random numbers on {device} as in the forward pass: "
                    "another thread used the same generator at the same time, or the function is not deterministic; "
                    "train in separate processes, or store its block's activations with the policy `Store()`."
                )


class OtherNumbersError(ReconstructionError):
    """Raised if a replay drew different random numbers from the first run, or fewer or more of them."""


def run_restored(
    call: "RecordedCall",
    run_again: Callable[..., Any],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    fill: bool,
    is_rounded: bool,
    needs_result: bool,
) -> Any:
    """Run a function again with `run_again`, with all state restored.

    Raises:
        ReconstructionError: The replay did not draw the same random numbers as the first run, or wrote to a parameter.
    """
    try:
        with restored(call) as lasting, _parameters_watched(call):
            return run_again(call, function, args, lasting, fill, is_rounded, needs_result)
    except OtherNumbersError:
        if needs_result or call.stop_after < 0:
            raise
    # It stopped early, perhaps before it drew all of its numbers. Only a run to the end can show that.
    call.stop_after = -1
    with restored(call) as lasting, _parameters_watched(call):
        return run_again(call, function, args, lasting, fill, is_rounded, needs_result)


@contextmanager
def _parameters_watched(call: "RecordedCall") -> Iterator[None]:
    """Raise if a function with a state in buffers, such as a counter, writes to a parameter that has no copy.

    It may write through `.data` in some calls, which need not be the ones in which the parameters are compared.
    """
    before = _samples(call)
    yield
    if _samples(call) != before:
        raise ReconstructionError(
            f"`{call.name}` wrote to a parameter through `.data`, and not in its first call, so running it again wrote "
            "to the parameter a second time; write to it outside of the function, or store its block's activations "
            "with the policy `Store()`."
        )


def _samples(call: "RecordedCall") -> list[bytes]:
    """Return the bits of a sample of each parameter, if the function has changed a buffer."""
    can_read = call.states and not call.surroundings.is_captured
    tensors = [parameter.data for parameter in call.parameters] if can_read else []
    return [
        array_of(tensor)[places(tensor.shape, SIZE)].tobytes()
        for tensor in tensors
        if is_on_host(tensor) and has_memory(tensor)
    ]


def _places_to_fill(call: "RecordedCall") -> Iterator[tuple[TensorPlace, Tensor | None]]:
    """Yield each place of a tensor, with a value if the replay gets a copy of it to write to."""
    plan = call.plan
    copied = {*plan.statistics}
    for number, ((holder, name), parameter) in enumerate(zip(plan.parameter_places, call.parameters, strict=True)):
        yield TensorPlace(holder, name, parameter), (call.written or {}).get(number)
    for number, ((holder, name), buffer) in enumerate(zip(plan.buffer_places, call.buffers, strict=True)):
        value = (call.states or {}).get(number)
        # A buffer that is only written may begin with any value, so a copy of its current value will do.
        yield TensorPlace(holder, name, buffer), buffer if value is None and number in copied else value


def _autocast_contexts(call: "RecordedCall") -> list[AbstractContextManager[Any]]:
    # It was off, and is on now if the backward pass runs under autocast.
    if not call.autocast:
        types = filter(torch.is_autocast_enabled, call.surroundings.autocast_types)
        return [torch.autocast(device_type, enabled=False) for device_type in types]
    return [
        torch.autocast(state.device_type, state.dtype, state.enabled, state.cache_enabled)
        for state in call.autocast
        if state.enabled or torch.is_autocast_enabled(state.device_type)
    ]


def _is_freed(parameter: Tensor) -> bool:
    """Return whether the memory of an ordinary tensor was freed, as FSDP does it."""
    is_usual = type(parameter) in (Tensor, nn.Parameter) and parameter.layout is torch.strided
    return is_usual and not in_functorch_transform() and parameter.untyped_storage().nbytes() < parameter.nbytes
