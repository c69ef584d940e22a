"""Record the storages and operations of a training step without disturbing it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from revnet._torch_internals import FakeTensor, current_node, next_sequence_number, python_operator, sequence_number_of
from revnet.engine._keep import any_requires_grad, fresh_outputs
from revnet.memory.step._flops import FLOP_FORMULAS
from revnet.memory.step._step_log import NO_MODULE, Call, Integers, StepLog
from revnet.memory.step._storage_watch import StorageWatch
from revnet.nn import AbstractReversibleBlock
from revnet.nn.policies._keep_spec import kind_of

_aten = torch.ops.aten
# Returns its argument, a new tensor that no recorded operation created: `torch.tensor` ends with it.
_FRESH = {_aten.lift_fresh.default}
_DEVICE = torch.ops.prim.device.default
_META = torch.device("meta")
# These move and allocate nothing, and their number differs between fake and real tensors: the engine reads the values
# of real tensors through detached aliases, for instance. If they counted, `predict` would differ from `measure`.
_QUERIES = {_DEVICE, _aten.detach.default, _aten.promote_types.default}
_ALLOCATIONS = {
    packet
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
    if (packet := getattr(_aten, name, None)) is not None
}
_RESIZES = {_aten.resize_, _aten.resize_as_, _aten.set_}
# Operations with which autograd copies a gradient into `grad` when it cannot reuse the tensor itself.
_COPIES = {_aten.new_empty_strided.default, _aten.clone.default}
_ACCUMULATES = 2**64 - 1
"""Sequence number of every node that accumulates a gradient into `grad`."""


def _takes_no_hooks(module: nn.Module) -> bool:
    """Return whether a hook would change the way the module runs, or is not allowed, as in a script."""
    is_special = isinstance(module, AbstractReversibleBlock | torch.jit.ScriptModule)
    return is_special or getattr(module, "runs_only_with_hooks", False)


class Recorder(TorchDispatchMode):
    """Record the storages and operations of whatever runs while this mode is active.

    Storages count as in `LiveBytes`, and recording keeps none alive. Within `following(model)`, it also records which
    module runs and when a storage becomes the gradient of a parameter.

    While `counts_costs` is false, it records storages, and neither arithmetic nor movement of bytes.

    Args:
        storages: Counts the storages, and is closed at the end.
    """

    def __init__(self, storages: StorageWatch):
        super().__init__()
        self._storages = storages
        self._operations = _Operations()
        self._gradient_since: dict[int, int] = {}
        self._copies: set[int] = set()

        self._sequence: list[int] = []
        self._flops: list[int] = []
        self._moved_bytes: list[int] = []
        self._keep_kinds: list[int] = []
        self.counts_costs = True

        self._names: list[str] = []
        self._calls: list[_OpenCall] = []
        self._open: list[_OpenCall] = []
        self._start_sequence = self._last_sequence = _next_sequence()
        self._forward_end: int | None = None
        self._forward_end_sequence = 0

    @property
    def _event(self) -> int:
        return self._storages.event

    @property
    def running_module(self) -> str:
        """Name of the innermost module that was called and has not returned; "" for the model itself."""
        return self._names[self._open[-1].module_index] if self._open else ""

    @contextmanager
    def following(self, model: nn.Module) -> Iterator[None]:
        """Record calls of modules in `model` and gradients of its parameters; remove all hooks on exit."""
        with ExitStack() as stack:
            for index, (name, module) in enumerate(model.named_modules()):
                self._names.append(name)
                # `calling` records the model itself.
                if index == 0 or _takes_no_hooks(module):
                    continue
                enter = module.register_forward_pre_hook(self._entering(index), prepend=True)
                stack.callback(enter.remove)
                leave = module.register_forward_hook(self._leave)
                stack.callback(leave.remove)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    if parameter._post_accumulate_grad_hooks is None:  # removing the last hook leaves an empty list
                        stack.callback(setattr, parameter, "_post_accumulate_grad_hooks", None)
                    hook = parameter.register_post_accumulate_grad_hook(self._note_gradient)
                    stack.callback(hook.remove)
            yield

    @contextmanager
    def calling(self, model: nn.Module) -> Iterator[None]:
        """Record the call of the model, which runs inside."""
        self._enter(0, model)
        yield
        self._leave(model)

    def end_forward(self) -> None:
        """Mark the end of the forward pass."""
        self._forward_end, self._forward_end_sequence = self._event, _next_sequence()
        self._last_sequence = self._forward_end_sequence
        self._end_event(self._last_sequence, 0, 0)

    def end(self) -> None:
        """Mark the end of the step."""
        self._end_event(self._current_sequence(), 0, 0)

    def log(self) -> StepLog:
        """Return what was recorded; call `end_forward` and `end` first."""
        assert self._forward_end is not None
        sequence, storages = np.array(self._sequence, np.int64), self._storages
        return StepLog(
            births=np.array(storages.births, np.int64),
            deaths=_spread(storages.deaths, len(storages.births), self._event),
            sizes=np.array(storages.sizes, np.int64),
            gradient_since=_spread(self._gradient_since, len(storages.births), self._event),
            creators=np.array(storages.creators, np.int64),
            sequence=sequence,
            owners=_owners(sequence - self._start_sequence, self._start_sequence, self._forward_end, self._calls),
            flops=np.array(self._flops, np.int64),
            moved_bytes=np.array(self._moved_bytes, np.int64),
            keep_kinds=np.array(self._keep_kinds, np.int64),
            calls=[call.finished(self._names) for call in self._calls],
            modules=tuple(self._names),
            forward_end=self._forward_end,
        )

    def __exit__(self, *exception: Any) -> None:
        """Stop recording and release all memory."""
        super().__exit__(*exception)
        self._storages.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and record its cost and the storages that it creates."""
        if func is _DEVICE and type(args[0]) is FakeTensor:  # About half of all calls; this is the answer of its mode.
            return _META if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
        kwargs = kwargs or {}
        operation = self._operations[func]
        if operation.function is not None:
            with _active(self):
                return operation.function(*args, **kwargs)
        result = func(*args, **kwargs)
        if func in _QUERIES:
            return result
        sequence = self._current_sequence()
        outputs = _tensors_in(result)
        flops, moved_bytes = operation.costs(args, kwargs, result, outputs) if self.counts_costs else (0, 0)
        if operation.is_fresh or operation.may_resize:
            for tensor in outputs:
                self._watch(tensor, func)
        elif self._storages.notes_kept and args and type(args[0]) is not FakeTensor:
            # A view of a real tensor, for instance of a global one, which becomes fake.
            self._storages.note(tensor for tensor in outputs if type(tensor) is FakeTensor)
        self._end_event(sequence, flops, moved_bytes, operation.keep_kind_of(func, args, kwargs, result))
        return result

    def _watch(self, tensor: Tensor, func: Any) -> None:
        index = self._storages.watch(tensor, self._open[-1].module_index if self._open else NO_MODULE)
        if index is None or func not in _COPIES or self._forward_end is None:
            return
        if _running_sequence() == _ACCUMULATES:
            self._copies.add(index)

    def _end_event(self, sequence: int, flops: int, moved_bytes: int, keep_kind: int = 0) -> None:
        self._sequence.append(sequence)
        self._flops.append(flops)
        self._moved_bytes.append(moved_bytes)
        self._keep_kinds.append(keep_kind)
        self._storages.event += 1

    def _current_sequence(self) -> int:
        if self._forward_end is None:
            return _next_sequence()
        running = _running_sequence()
        # A node that accumulates into `grad` runs right after the node that computed the gradient. Nodes that a
        # backward pass creates, to run a part of the network again, run inside the node that they belong to. Both have
        # numbers outside the range of the forward pass, and count for its node that ran last.
        if running is not None and self._start_sequence <= running < self._forward_end_sequence:
            self._last_sequence = running
        return self._last_sequence

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
            while self._open:  # a call that ended in an exception, caught further out, never got here
                call = self._open.pop()
                call.stop_event, call.stop_sequence = self._event, _next_sequence()
                if call.module is module:
                    break

    def _is_forward(self) -> bool:
        """Return whether the forward pass runs, and not a backward pass within it, which may call modules again."""
        return self._forward_end is None and current_node() is None

    def _note_gradient(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        if gradient is None or gradient.layout is not torch.strided:
            return
        index = self._storages.index_of(gradient)
        if index is not None:
            since = self._storages.births[index] if index in self._copies else self._event
            self._gradient_since.setdefault(index, since)


@contextmanager
def _active(recorder: Recorder) -> Iterator[None]:
    """Record what an operator runs; while a mode handles an operator, it is off."""
    TorchDispatchMode.__enter__(recorder)
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(recorder, None, None, None)


@dataclass(frozen=True, eq=False)
class _Operation:
    """Properties of an operation that do not depend on its arguments."""

    is_fresh: bool
    """Whether it may return new memory; views and in-place operations return existing memory."""
    may_resize: bool
    """Whether it may give an existing tensor more memory."""
    moves: bool
    """Whether it reads or writes the elements of tensors."""
    count_flops: Callable[..., int] | None
    function: Callable[..., Any] | None
    """The function that an operator in Python runs, whose operations count instead of it."""
    keep_kind: int
    """1 plus the index in `KEEP_NAMES`; 0 for an operator that has no such name."""

    @classmethod
    def of(cls, func: Any) -> "_Operation":
        schema = func._schema
        is_fresh = func in _FRESH or any(output.alias_info is None for output in schema.returns)
        is_view = any(
            argument.alias_info is not None and not argument.alias_info.is_write for argument in schema.arguments
        )
        moves = not is_view and func.overloadpacket not in _ALLOCATIONS
        index = kind_of(func)
        kind = 0 if index is None else index + 1
        may_resize = func.overloadpacket in _RESIZES or any(argument.is_out for argument in schema.arguments)
        return cls(is_fresh, may_resize, moves, FLOP_FORMULAS.get(func.overloadpacket), python_operator(func), kind)

    def costs(self, args: Any, kwargs: Any, result: Any, outputs: Sequence[Tensor]) -> tuple[int, int]:
        """Return the floating-point operations of a call, and the bytes that it reads and writes."""
        flops = 0 if self.count_flops is None else self.count_flops(*args, **kwargs, out_val=result)
        if not self.moves:
            return flops, 0
        inputs = _tensors_in((*args, *kwargs.values()))
        return flops, sum(map(_num_bytes, outputs)) + sum(map(_num_bytes, inputs))

    def keep_kind_of(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        """Return the kind of a call, as in `StepLog.keep_kinds`."""
        if not self.keep_kind or not torch.is_grad_enabled() or not any_requires_grad(args, kwargs):
            return 0
        return self.keep_kind if fresh_outputs(func, args, kwargs, result) else -self.keep_kind


class _Operations(dict[Any, _Operation]):
    """The operations that ran, whose properties are determined when they first run."""

    def __missing__(self, func: Any) -> _Operation:
        return self.setdefault(func, _Operation.of(func))


class _OpenCall:
    """Call of a module that has not returned yet."""

    __slots__ = ("module", "module_index", "start_event", "start_sequence", "stop_event", "stop_sequence")

    def __init__(self, module_index: int, module: nn.Module, start_event: int, start_sequence: int):
        self.module_index = module_index
        self.module = module
        self.start_event = self.stop_event = start_event
        self.start_sequence = self.stop_sequence = start_sequence

    def finished(self, names: Sequence[str]) -> Call:
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
    """Return the sequence number of the node that a backward pass runs on this thread; None outside one."""
    node = current_node()
    return None if node is None else sequence_number_of(node)


def _tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors among an operation's arguments or results, which nest only in lists and tuples."""
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
    """Return the module that runs at each event: by event in the forward pass, by sequence number in the backward."""
    owners = np.full(len(sequence), NO_MODULE, np.int64)
    by_sequence = np.full(int(sequence.max()) + 1, NO_MODULE, np.int64)
    for call in calls:  # inner calls begin later and overwrite outer ones
        owners[call.start_event : call.stop_event] = call.module_index
        by_sequence[call.start_sequence - start_sequence : call.stop_sequence - start_sequence] = call.module_index
    owners[forward_end:] = by_sequence[sequence[forward_end:]]
    return owners
