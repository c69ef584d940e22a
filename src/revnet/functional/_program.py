"""What a compiled chain of half-blocks runs, beside the tensors that the graph hands it.

`torch.compile` fixes and guards it while tracing; operators find it by its number. See `_compiled`.
"""

import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from revnet._types import TensorPair
from revnet.coupling import AbstractCoupling
from revnet.errors import ReconstructionError
from revnet.functional._batch_norm import is_torch_norm
from revnet.functional._half_block import HalfBlock, residual_of
from revnet.functional._recompute import Entry
from revnet.functional._storage import storage_key

Result = TypeVar("Result")

TENSOR = "<tensor>"  # Stands for a tensor in the structure of the arguments, which must consist of constants.


class _Call(NamedTuple):
    function: int
    """Which of the program's functions."""
    updates: Literal[0, 1]
    name: str
    coupling: AbstractCoupling
    reads: torch.dtype | None


class Program:
    """What a compiled chain of half-blocks runs, beside the tensors that the graph hands it.

    It does not keep the functions alive: it goes when the first of them goes.
    """

    def __init__(
        self,
        functions: Sequence[nn.Module],
        calls: Sequence[tuple[int, Literal[0, 1], str, int, torch.dtype | None]],
        training: Sequence[Sequence[bool]],
        autocast: Sequence[tuple[str, torch.dtype, bool]],
        arguments: Any,
        wants_log_det: bool,
    ):
        self.calls = [
            _Call(function, updates, name, AbstractCoupling.of_number(coupling), reads)
            for function, updates, name, coupling, reads in calls
        ]
        self._functions = [weakref.ref(function) for function in functions]
        self._training = training
        self._autocast = autocast
        self._arguments = arguments
        self.has_log_det = wants_log_det and not all(call.coupling.is_additive for call in self.calls)
        # Where the modules of each function hold their parameters and buffers, module by module.
        self._parameter_places = [_places(function, "_parameters") for function in functions]
        self._buffer_places = [_places(function, "_buffers") for function in functions]
        # Batch norm in training: written to, never read.
        self._is_scratch = [
            id(holder) in norms
            for function, places in zip(functions, self._buffer_places, strict=True)
            for norms in [{id(m._buffers) for m in function.modules() if is_torch_norm(m) and m.training}]
            for holder, _ in places
        ]
        self.draws: list[bool] | None = None
        """For each call, whether it moves the random state. Found by the probe."""
        self.is_constant: list[bool] = []
        """For each buffer, whether every call leaves it as it is. Found by the probe."""

    def half_block(self, call: _Call) -> HalfBlock:
        """The half-block that a call runs."""
        return HalfBlock(
            self.function(call.function), call.updates, call.name, coupling=call.coupling, reads=call.reads
        )

    def function(self, which: int) -> nn.Module:
        function = self._functions[which]()
        if function is None:
            raise ReconstructionError(
                "a residual function of a compiled reversible sequence no longer exists; keep the model until the "
                "backward pass is done."
            )
        return function

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with `tensors` in their places."""
        remaining = iter(tensors)
        leaves, spec = tree_flatten(self._arguments)
        args, kwargs = tree_unflatten([next(remaining) if leaf == TENSOR else leaf for leaf in leaves], spec)
        return args, kwargs

    def no_log_det(self, x1: Tensor) -> Tensor:
        """Of no calls: zeros, (B,); nothing where nobody asks, or volumes stay as they are."""
        return x1.new_zeros(len(x1) if self.has_log_det else 0, dtype=x1.dtype.to_real())

    def log_det(self, call: _Call, x: Tensor, residual: Tensor) -> Tensor | None:
        """That of one call, if it is wanted."""
        if not self.has_log_det or call.coupling.is_additive:
            return None
        return call.coupling.log_det(x, residual)

    def of_function(self, which: int, tensors: Sequence[Any], kind: Literal["parameters", "buffers"]) -> Sequence[Any]:
        """The part of `tensors`, one for each parameter or buffer, that belongs to one function."""
        places = self._parameter_places if kind == "parameters" else self._buffer_places
        start = sum(map(len, places[:which]))
        return tensors[start : start + len(places[which])]

    def merge(self, constants: Sequence[Tensor], changing: Sequence[Tensor]) -> list[Tensor]:
        """All buffers, in order."""
        first, second = iter(constants), iter(changing)
        return [next(first if constant else second) for constant in self.is_constant]

    def scratch_for(self, constants: Sequence[Tensor]) -> list[Tensor]:
        """All buffers for recomputations: copies of those that change, to be written to."""
        remaining = iter(constants)
        places = itertools.chain.from_iterable(self._buffer_places)
        return [
            next(remaining) if constant else holder[name].detach().clone()
            for constant, (holder, name) in zip(self.is_constant, places, strict=True)
        ]

    def kept(self, which: int, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Those of a function's buffers that a recomputation must find as the forward pass found them."""
        return [
            buffer
            for buffer, constant, scratch in zip(
                self.of_function(which, buffers, "buffers"),
                self.of_function(which, self.is_constant, "buffers"),
                self.of_function(which, self._is_scratch, "buffers"),
                strict=True,
            )
            if not (constant or scratch)
        ]

    @contextmanager
    def entered(self, which: int, parameters: Sequence[Tensor], buffers: Sequence[Tensor]) -> Iterator[None]:
        """One function with these of its tensors in place, under the training flags and autocast of the trace."""
        with ExitStack() as stack:
            for device_type, dtype, enabled in self._autocast:
                if enabled or torch.is_autocast_enabled(device_type):
                    # No cache: it would keep casts of tensors that are gone after the call.
                    stack.enter_context(torch.autocast(device_type, dtype, enabled, cache_enabled=False))
            for module, training in zip(self.function(which).modules(), self._training[which], strict=True):
                if module.training != training:
                    stack.callback(setattr, module, "training", module.training)
                    module.training = training
            for places, tensors in (
                (self._parameter_places[which], self.of_function(which, parameters, "parameters")),
                (self._buffer_places[which], self.of_function(which, buffers, "buffers")),
            ):
                for (holder, name), tensor in zip(places, tensors, strict=True):
                    stack.callback(Entry(holder, name, tensor).swap(tensor))
            yield

    def write_back(self, which: int, buffers: Sequence[Tensor]) -> None:
        """Copy buffers that the function replaced (`self.average = ...`) into the ones that it was given."""
        for (holder, name), buffer in zip(
            self._buffer_places[which], self.of_function(which, buffers, "buffers"), strict=True
        ):
            if holder[name] is not buffer:
                buffer.copy_(holder[name])


def _places(function: nn.Module, attribute: str) -> list[tuple[dict[str, Any], str]]:
    return [
        (holder, name)
        for holder in (getattr(module, attribute) for module in function.modules())
        for name, tensor in holder.items()
        if tensor is not None
    ]


def _constant_while_tracing(function: Callable[..., Result]) -> Callable[..., Result]:
    """`torch.compiler.assume_constant_result`, which would load the whole compiler with this module."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_FUNCTIONS: "weakref.WeakValueDictionary[int, nn.Module]" = weakref.WeakValueDictionary()
_HANDLES: "weakref.WeakKeyDictionary[nn.Module, int]" = weakref.WeakKeyDictionary()
PROGRAMS: dict[int, Program] = {}
_numbers = itertools.count()


@_constant_while_tracing
def handle_of(function: nn.Module) -> int:
    """The number by which traced code knows a function; the trace holds for this function only."""
    handle = _HANDLES.setdefault(function, next(_numbers))
    _FUNCTIONS[handle] = function
    return handle


@_constant_while_tracing
def program_of(
    handles: list[int],
    calls: list[tuple[int, Literal[0, 1], str, int, torch.dtype | None]],
    training: list[list[bool]],
    autocast: list[tuple[str, torch.dtype, bool]],
    arguments: Any,
    wants_log_det: bool,
) -> int:
    """Make a program, while tracing, and return its number."""
    functions = [_FUNCTIONS[handle] for handle in handles]
    _check(functions)
    number = next(_numbers)
    PROGRAMS[number] = Program(functions, calls, training, autocast, arguments, wants_log_det)
    weakref.finalize(functions[0], PROGRAMS.pop, number, None)
    return number


@_constant_while_tracing
def constant_buffers(program: int) -> list[bool]:
    return PROGRAMS[program].is_constant


@_constant_while_tracing
def passes_gradients(program: int) -> bool:
    return all(call.coupling.is_additive for call in PROGRAMS[program].calls)


@_constant_while_tracing
def has_log_det(program: int) -> bool:
    return PROGRAMS[program].has_log_det


def _check(functions: Sequence[nn.Module]) -> None:
    seen: set[int] = set()
    for function in functions:
        for parameter in function.parameters():
            if hasattr(parameter, "device_mesh"):
                raise NotImplementedError(
                    "a reversible sequence with sharded parameters (FSDP) cannot be compiled as a whole; compile its "
                    "residual functions instead: `block.f.compile(); block.g.compile()`."
                )
        for holder, name in _places(function, "_buffers"):
            if id(holder[name]) in seen:
                raise NotImplementedError(
                    f"`{name}` is a buffer of two modules in a compiled reversible sequence; share the whole residual "
                    "function instead, or compile the residual functions only: `block.f.compile(); block.g.compile()`."
                )
            seen.add(id(holder[name]))


class _Watch(TorchDispatchMode):
    """Notes random operations, and which storages are written to."""

    def __init__(self) -> None:
        super().__init__()
        self.draws = False
        self.written: set[int | None] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        values = {argument.name: argument.default_value for argument in func._schema.arguments}
        values.update(zip(values, args, strict=False))
        values.update(kwargs or {})
        is_off = values.get("dropout_p") == 0 or values.get("train") is False or values.get("training") is False
        if torch.Tag.nondeterministic_seeded in func.tags and not is_off:
            self.draws = True
        for argument in func._schema.arguments:
            if argument.is_write:
                self.written |= {storage_key(t) for t in tree_leaves(values.get(argument.name)) if _is_tensor(t)}
        return func(*args, **(kwargs or {}))


@contextmanager
def _with_real_tensors(fake: Tensor) -> Iterator[None]:
    """Functions may use tensors that are no argument, parameter or buffer, which the trace has not made fake."""
    mode = detect_fake_mode(fake)
    assert mode is not None
    allowed = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True
    try:
        yield
    finally:
        mode.allow_non_fake_inputs = allowed


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def probe(
    program: Program,
    x1: Tensor,
    x2: Tensor,
    arguments: Sequence[Tensor],
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
) -> TensorPair:
    """Run the calls on fake tensors; returns the streams behind them, and tells the program what they did."""
    args, kwargs = program.arguments(arguments)
    streams = [x1, x2]
    draws = []
    changed: set[int] = set()
    positions = range(len(buffers))
    for call in program.calls:
        copies = [buffer.clone() for buffer in buffers]
        source = streams[1 - call.updates]
        watch = _Watch()
        try:
            with torch.no_grad(), program.entered(call.function, parameters, copies), _with_real_tensors(x1), watch:
                residual = residual_of(program.half_block(call), source, args, kwargs)
                of_function = program.of_function(call.function, positions, "buffers")
                for position, (holder, name) in zip(of_function, program._buffer_places[call.function], strict=True):
                    # Kernels write to running statistics without saying so; no vector is trusted to be constant.
                    if (
                        holder[name] is not copies[position]
                        or storage_key(copies[position]) in watch.written
                        or copies[position].dim() <= 1
                    ):
                        changed.add(position)
            streams[call.updates] = call.coupling.forward(streams[call.updates], residual, call.name)
            draws.append(watch.draws)
        except (DataDependentOutputException, DynamicOutputShapeException):
            # What it does depends on values: expect everything.
            changed.update(program.of_function(call.function, positions, "buffers"))
            streams[call.updates] = torch.empty_like(streams[call.updates])
            draws.append(True)
    if program.draws is None:
        program.draws = draws
        program.is_constant = [position not in changed for position in positions]
    return streams[0], streams[1]
