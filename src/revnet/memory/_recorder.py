"""Follows a training step from operation to operation, without disturbing it."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from revnet._torch_internals import current_node, next_sequence_number, sequence_number_of
from revnet.memory._flops import FLOP_FORMULAS
from revnet.memory._log import NOBODY, Call, Integers, StepLog
from revnet.nn import AbstractReversibleBlock

_aten = torch.ops.aten
# Gives its argument back, of which nobody has heard before: what `torch.tensor` makes.
_FRESH = {_aten.lift_fresh.default}
# What moves and allocates nothing, and what fake and real tensors are not asked equally often: the engine looks at the
# values of real ones through detached aliases, and asks less of a dtype that it can compare at once.
_QUESTIONS = {torch.ops.prim.device.default, _aten.detach.default, _aten.promote_types.default}
_ALLOCATIONS = {
    packet
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    if (packet := getattr(_aten, name, None)) is not None
}
# What autograd does when it cannot take a gradient over, but must copy it into `grad`.
_COPIES = {_aten.new_empty_strided.default, _aten.clone.default}
_ACCUMULATES = 2**64 - 1
"""The sequence number of every node that puts a gradient into `grad`."""


class Recorder(TorchDispatchMode):
    """Note the storages and the operations of whatever runs while this mode is active.

    It counts as `LiveBytes` does, and keeps nothing alive. `following` a model adds which module was at work, and when
    gradients became those of parameters.

    Args:
        ignore: Tensors that are there all the time: their storages do not count.
        device_type: Where storages count ("cpu"): what is kept elsewhere costs no memory there.
    """

    def __init__(self, ignore: Iterable[Tensor], device_type: str):
        super().__init__()
        self._device_type = device_type
        # Kept alive, so that no counted storage can take the place of an ignored one.
        self._ignored = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in ignore}
        self._operations: dict[Any, _Operation] = {}
        self._references: dict[int, _Reference] = {}
        self._births: list[int] = []
        self._deaths: dict[int, int] = {}
        self._sizes: list[int] = []
        self._creators: list[int] = []
        self._gradient_since: dict[int, int] = {}
        self._copies: set[int] = set()

        self._event = 0
        self._sequence: list[int] = []
        self._flops: list[int] = []
        self._moved_bytes: list[int] = []

        self._names: list[str] = []
        self._calls: list[_OpenCall] = []
        self._open: list[_OpenCall] = []
        self._start_sequence = self._last_sequence = _next_sequence()
        self._forward_end: int | None = None
        self._forward_end_sequence = 0

    @property
    def module_at_work(self) -> str:
        """The name of the innermost module that was called and has not returned; "" for the model itself."""
        return self._names[self._open[-1].module_index] if self._open else ""

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Note calls of modules in `model`, and gradients of its parameters; leaves no hook behind."""
        with ExitStack() as stack:
            for index, (name, module) in enumerate(model.named_modules()):
                self._names.append(name)
                # The model is called by `calling`; with a hook, a block would run in another way; scripts take none.
                if index == 0 or isinstance(module, AbstractReversibleBlock | torch.jit.ScriptModule):
                    continue
                enter = module.register_forward_pre_hook(self._entering(index), prepend=True)
                stack.callback(enter.remove)
                leave = module.register_forward_hook(self._leave)
                stack.callback(leave.remove)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    if parameter._post_accumulate_grad_hooks is None:  # Removing the last one leaves an empty list.
                        stack.callback(setattr, parameter, "_post_accumulate_grad_hooks", None)
                    hook = parameter.register_post_accumulate_grad_hook(self._note_gradient)
                    stack.callback(hook.remove)
            yield

    @contextmanager
    def calling(self, model: nn.Module) -> Iterator[None]:
        """Around the call of the model."""
        self._enter(0, model)
        yield
        self._leave(model)

    def end_forward(self) -> None:
        """Mark the end of the forward pass."""
        self._forward_end = self._event
        self._forward_end_sequence = _next_sequence()
        self._last_sequence = self._forward_end_sequence
        self._end_event(self._last_sequence, 0, 0)

    def end(self) -> None:
        """Mark the end of the step."""
        self._end_event(self._sequence_at_work(), 0, 0)

    def log(self) -> StepLog:
        """What was recorded, after `end_forward` and `end`."""
        assert self._forward_end is not None
        births = np.array(self._births, np.int64)
        calls = [call.closed(self._names) for call in self._calls]
        sequence = np.array(self._sequence, np.int64)
        return StepLog(
            births=births,
            deaths=_spread(self._deaths, len(births), self._event),
            sizes=np.array(self._sizes, np.int64),
            gradient_since=_spread(self._gradient_since, len(births), self._event),
            creators=np.array(self._creators, np.int64),
            sequence=sequence,
            owners=_owners(sequence - self._start_sequence, self._start_sequence, self._forward_end, self._calls),
            flops=np.array(self._flops, np.int64),
            moved_bytes=np.array(self._moved_bytes, np.int64),
            calls=calls,
            modules=tuple(self._names),
            forward_end=self._forward_end,
        )

    def __exit__(self, *exception: Any) -> None:
        """Stop, and let go of all memory."""
        super().__exit__(*exception)
        self._references.clear()
        self._ignored.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and note what it cost and what it made."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _QUESTIONS:
            return result
        operation = self._operations.get(func)
        if operation is None:
            operation = self._operations[func] = _Operation.of(func)
        sequence = self._sequence_at_work()
        flops = 0 if operation.count_flops is None else operation.count_flops(*args, **kwargs, out_val=result)
        moved_bytes = 0
        outputs = _tensors_in(result)
        if operation.moves:
            moved_bytes = sum(map(_num_bytes, outputs))
            moved_bytes += sum(map(_num_bytes, _tensors_in((*args, *kwargs.values()))))
        if operation.is_fresh:
            for tensor in outputs:
                if tensor.layout is torch.strided and tensor.device.type == self._device_type:
                    self._watch(tensor.untyped_storage(), func)
        self._end_event(sequence, flops, moved_bytes)
        return result

    def _watch(self, storage: torch.UntypedStorage, func: Any) -> None:
        key = storage._cdata
        if key in self._ignored or key in self._references:
            return
        index = len(self._births)
        reference = self._references[key] = _Reference(storage, self._freed)
        reference.key, reference.index = key, index
        self._births.append(self._event)
        self._sizes.append(storage.nbytes())
        self._creators.append(self._open[-1].module_index if self._open else NOBODY)
        if func in _COPIES and self._forward_end is not None and _running_sequence() == _ACCUMULATES:
            self._copies.add(index)

    def _freed(self, reference: Any) -> None:
        self._deaths[reference.index] = self._event
        del self._references[reference.key]

    def _end_event(self, sequence: int, flops: int, moved_bytes: int) -> None:
        self._sequence.append(sequence)
        self._flops.append(flops)
        self._moved_bytes.append(moved_bytes)
        self._event += 1

    def _sequence_at_work(self) -> int:
        if self._forward_end is None:
            return _next_sequence()
        running = _running_sequence()
        # Nodes that put gradients into `grad` come right after the one that the gradient is from. Those that a backward
        # pass made itself, to run a part of the network again, run inside the node which they belong to.
        if running is not None and self._start_sequence <= running < self._forward_end_sequence:
            self._last_sequence = running
        return self._last_sequence

    # Hooks ------------------------------------------------------------------------------------------------------------

    def _entering(self, index: int) -> Callable[[nn.Module, Any], None]:
        def enter(module: nn.Module, _: Any) -> None:
            self._enter(index, module)

        return enter

    def _enter(self, index: int, module: nn.Module) -> None:
        if self._is_forward():
            call = _OpenCall(index, module, self._event, _next_sequence())
            self._calls.append(call)
            self._open.append(call)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._is_forward():
            while self._open:  # Calls that an exception ended, which somebody caught, did not leave.
                call = self._open.pop()
                call.stop_event, call.stop_sequence = self._event, _next_sequence()
                if call.module is module:
                    break

    def _is_forward(self) -> bool:
        """Whether the forward pass runs, and no backward pass inside it, which calls modules to compute again."""
        return self._forward_end is None and current_node() is None

    def _note_gradient(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or gradient.layout is not torch.strided:
            return
        reference = self._references.get(gradient.untyped_storage()._cdata)
        if reference is not None:
            index = reference.index
            since = self._births[index] if index in self._copies else self._event
            self._gradient_since.setdefault(index, since)


class _Reference(weakref.ref[torch.UntypedStorage]):
    """Tells when a storage is gone, and which it was."""

    __slots__ = ("index", "key")
    index: int
    key: int


class _Operation(NamedTuple):
    """What is known of an operation whatever its arguments."""

    is_fresh: bool
    """Whether it may return new memory; a view or an in-place operation returns memory that was there."""
    moves: bool
    """Whether it reads or writes what is in the tensors."""
    count_flops: Callable[..., int] | None

    @classmethod
    def of(cls, func: Any) -> "_Operation":
        schema = func._schema
        is_fresh = func in _FRESH or any(each.alias_info is None for each in schema.returns)
        is_view = any(each.alias_info is not None and not each.alias_info.is_write for each in schema.arguments)
        moves = not is_view and func.overloadpacket not in _ALLOCATIONS
        return cls(is_fresh, moves, FLOP_FORMULAS.get(func.overloadpacket))


class _OpenCall:
    """A call of a module that has not returned yet."""

    __slots__ = ("module", "module_index", "start_event", "start_sequence", "stop_event", "stop_sequence")

    def __init__(self, module_index: int, module: nn.Module, start_event: int, start_sequence: int):
        self.module_index = module_index
        self.module = module
        self.start_event = self.stop_event = start_event
        self.start_sequence = self.stop_sequence = start_sequence

    def closed(self, names: Sequence[str]) -> Call:
        return Call(
            names[self.module_index],
            self.module,
            self.start_event,
            self.stop_event,
            self.start_sequence,
            self.stop_sequence,
        )


def _next_sequence() -> int:
    return next_sequence_number()


def _running_sequence() -> int | None:
    """The sequence number of the node that a backward pass runs on this thread."""
    node = current_node()
    return None if node is None else sequence_number_of(node)


def _tensors_in(values: Any) -> list[Tensor]:
    """The tensors among an operation's arguments or results, which are flat but for lists."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors_in(value)]
    return []


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _spread(values: dict[int, int], length: int, default: int) -> Integers:
    spread = np.full(length, default, np.int64)
    spread[list(values.keys())] = list(values.values())
    return spread


def _owners(sequence: Integers, start_sequence: int, forward_end: int, calls: Sequence[_OpenCall]) -> Integers:
    """(events,) The module at work: by the order of events in the forward pass, by sequence numbers in the other."""
    owners = np.full(len(sequence), NOBODY, np.int64)
    by_sequence = np.full(int(sequence.max()) + 1, NOBODY, np.int64)
    for call in calls:  # Inner ones begin later, and paint over the outer ones.
        owners[call.start_event : call.stop_event] = call.module_index
        by_sequence[call.start_sequence - start_sequence : call.stop_sequence - start_sequence] = call.module_index
    owners[forward_end:] = by_sequence[sequence[forward_end:]]
    return owners
