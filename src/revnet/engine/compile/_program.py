"""Programs: everything that a compiled chain runs, apart from the tensors that the graph passes to its operators.

`torch.compile` creates a program while it traces, and guards the values that the program depends on. Operators look up
the program by its number.
"""

import hashlib
import itertools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from revnet._torch_internals import tree_flatten, tree_unflatten
from revnet._torch_release import constant_of_object, constant_while_tracing, warn_if_untested
from revnet.coupling import AbstractCoupling
from revnet.engine._batch_norm import is_torch_norm
from revnet.engine._chain import BoundChain, Chain, HalfBlock
from revnet.engine._restore import TensorPlace
from revnet.engine._tracing import CannotCompileError, refuse_sharded
from revnet.engine.compile._side_effects import check_arguments, drop_graphs_of_hooks
from revnet.errors import ReconstructionError

TENSOR = "<tensor>"
"""Placeholder for a tensor among the leaves of the arguments. The other leaves are constants, as `slice(constant)`."""

NUM_STREAMS = 2

Place = tuple[dict[str, Any], str]
"""The `_parameters` or `_buffers` dict of a module, and a key of that dict."""


class Step(NamedTuple):
    """A half-block of a program, with an index instead of the function, so that the function is not kept alive."""

    function: int
    """Index of the function in the program's list of functions."""
    target: int
    source: int
    name: str
    coupling: AbstractCoupling
    role: str
    takes_arguments: bool


@dataclass(frozen=True, slots=True)
class Reach:
    """The tensors on which a residual depends differentiably."""

    inputs: tuple[int, ...]
    """Positions of arguments and parameters among the inputs of the operators."""
    source: bool
    """Whether the residual depends on the stream that the function reads."""


@dataclass(frozen=True, slots=True)
class Findings:
    """Behavior of a program's functions, as observed in one run on fake tensors; see `_probe`."""

    draws: list[bool]
    """For each step, whether the function draws random numbers."""
    is_constant: list[bool]
    """For each buffer, whether no step changes it."""
    reaches: list[Reach]
    """For each step, the tensors that the residual depends on."""
    streams: list[str]
    """Final dtype and layout of each stream."""


class Called(NamedTuple):
    """Result of a call of a residual function."""

    residual: Tensor
    rebound: dict[int, Tensor]
    """Tensors that the function assigned to its buffers (`self.average = ...`), by position."""


class _Places(NamedTuple):
    """Modules of a function, and the places of its tensors, module by module."""

    modules: list[nn.Module]
    parameters: list[Place]
    buffers: list[Place]


class Program:
    """Everything that a compiled chain of half-blocks runs, apart from the tensors that the graph passes.

    The inputs of its operators are both streams, the tensors among the arguments, and the parameters of all functions,
    in this order. A program does not keep the functions alive. It is deleted when the first of them is.

    Args:
        functions: The distinct residual functions.
        steps: The half-blocks in order.
        training: The training flags of each function's modules.
        autocast: For each device type, the dtype and whether autocast is on.
        arguments: `args`, `kwargs` and `own_kwargs` of a bound chain, with the index of each leaf instead of the leaf.
        leaves: For each leaf of the arguments, `TENSOR` or `slice(constant)`.
        input_dtype: The dtype in which functions read a stream, if it differs from the dtype of the stream.
        wants_log_det: Whether the caller wants log-determinants.
    """

    def __init__(
        self,
        functions: Sequence[nn.Module],
        steps: Sequence[Step],
        training: Sequence[Sequence[bool]],
        autocast: Sequence[tuple[str, torch.dtype, bool]],
        arguments: Any,
        leaves: Sequence[Any],
        input_dtype: torch.dtype | None,
        wants_log_det: bool,
    ):
        self.steps = steps
        self.has_log_det = wants_log_det and not all(step.coupling.is_additive for step in steps)
        self.targets = {step.target for step in steps}
        self.findings: Findings | None = None
        self.refusal: NotImplementedError | TypeError | None = None
        """Reason why the program cannot run, if the probe found one, until it is raised."""
        self.cyclic: set[str] = set()
        """Names of the functions that leave reference cycles; see `check_no_graph_left`."""
        # Weak: `PROGRAMS` is global, and would keep every compiled model alive.
        self._functions = [weakref.ref(function) for function in functions]
        self._training = training
        self._autocast = autocast
        self._argument_spec = tree_flatten(arguments)[1]
        self._argument_leaves = leaves
        self._input_dtype = input_dtype
        first_parameter = NUM_STREAMS + leaves.count(TENSOR)
        self.argument_positions = range(NUM_STREAMS, first_parameter)
        self.parameter_positions = _consecutive(first_parameter, [places(f, "_parameters") for f in functions])
        """Positions of each function's parameters among the inputs."""
        buffer_places = [places(function, "_buffers") for function in functions]
        self.buffer_positions = _consecutive(0, buffer_places)
        """Positions of each function's buffers in the list of all buffers."""
        # In training, batch norm writes to its statistics and never reads them, so a replay needs no earlier values.
        norms = {id(m._buffers) for f in functions for m in f.modules() if is_torch_norm(m) and m.training}
        self._is_scratch = [id(holder) in norms for held in buffer_places for holder, _ in held]

    @property
    def known_findings(self) -> Findings:
        """Findings of the probe."""
        if self.findings is None:
            # The trace broke where the probe failed, and the operator ran by itself.
            raise ReconstructionError(
                "the residual functions of a compiled reversible sequence cannot run on tensors without values; "
                "compile the residual functions instead: `block.f.compile(); block.g.compile()`."
            )
        return self.findings

    def digest(self) -> str:
        """Return a string for everything that the shapes and the gradients of the operators depend on."""
        # Without numbers and identities, which are valid in one process only: compiled graphs are cached on disk.
        steps = [(step.target, step.source, type(step.coupling).__qualname__, step.coupling) for step in self.steps]
        traits = (steps, self.known_findings, self._is_scratch, self.has_log_det, self._input_dtype, self._autocast)
        return hashlib.sha256(repr(traits).encode()).hexdigest()

    def _function(self, index: int) -> nn.Module:
        function = self._functions[index]()
        if function is None:
            raise ReconstructionError(
                "a residual function of a compiled reversible sequence no longer exists; keep the model until the "
                "backward pass is done."
            )
        return function

    def _places(self, index: int) -> "_Places":
        """Return the modules of a function, and the places of its tensors.

        They are looked up in every call, because no guard of the compiler detects that another layer of the same class
        has replaced one.

        Raises:
            ReconstructionError: Modules or tensors were added or removed after the function was traced.
        """
        function = self._function(index)
        found = _Places(list(function.modules()), places(function, "_parameters"), places(function, "_buffers"))
        if (
            len(found.modules) != len(self._training[index])
            or len(found.parameters) != len(self.parameter_positions[index])
            or len(found.buffers) != len(self.buffer_positions[index])
        ):
            name = next(step.name for step in self.steps if step.function == index)
            raise ReconstructionError(
                f"`{name}` has gained or lost a module, a parameter or a buffer since it was traced; change a model "
                "between two steps, and call `torch.compiler.reset()` afterwards."
            )
        return found

    def half_block(self, step: Step) -> HalfBlock:
        """Return the half-block that corresponds to a step."""
        return HalfBlock(self._function(step.function), *step[1:])

    def leaves(self, step: Step, inputs: Sequence[Tensor], wanted: Sequence[bool]) -> dict[int, Tensor]:
        """Return the inputs of a function other than its stream, each as a new leaf, by position."""
        # New leaves for each call: nothing depends on the caller's graph, and tensors that the function keeps are
        # detected.
        leaves: dict[int, Tensor] = {}
        if step.takes_arguments:
            for position in self.argument_positions:
                leaves[position] = inputs[position].detach().requires_grad_(wanted[position])
        for position in self.parameter_positions[step.function]:
            leaves[position] = nn.Parameter(inputs[position].detach(), requires_grad=wanted[position])
        return leaves

    def call(self, step: Step, source: Tensor, leaves: Mapping[int, Tensor], buffers: Sequence[Tensor]) -> Called:
        """Call a residual function as `BoundChain.call` does, with these tensors instead of its own.

        It runs under the training flags and the autocast state of the trace.

        Raises:
            RuntimeError: The function modified its input in place.
            CannotCompileError: The function changed a container among its arguments.
        """
        half_block = self.half_block(step)
        tensors = iter([leaves[position] for position in self.argument_positions] if step.takes_arguments else [])
        flat = [next(tensors, None) if leaf == TENSOR else leaf.stop for leaf in self._argument_leaves]
        args, kwargs, own_kwargs = arguments = tree_unflatten(flat, self._argument_spec)
        chain = BoundChain(Chain([half_block]), args, kwargs, own_kwargs)
        chain.input_dtype = self._input_dtype
        with self._entered(step.function, leaves, buffers) as held:
            residual = chain.call(half_block, source)
            # Before the context puts the module's own buffers back.
            rebound = {
                position: holder[name]
                for position, (holder, name) in zip(self.buffer_positions[step.function], held.buffers, strict=True)
                if holder[name] is not buffers[position]
            }
        check_arguments(step.name, arguments, flat, self._argument_spec)
        # Otherwise, their graph would look like a tensor that the function keeps (`check_no_graph_left`).
        drop_graphs_of_hooks(half_block.function)
        return Called(residual, rebound)

    @contextmanager
    def _entered(self, index: int, leaves: Mapping[int, Tensor], buffers: Sequence[Tensor]) -> "Iterator[_Places]":
        held = self._places(index)
        with ExitStack() as stack:
            for device_type, dtype, enabled in self._autocast:
                if enabled or torch.is_autocast_enabled(device_type):
                    # No cache, which would keep casts of tensors that do not outlive the call.
                    stack.enter_context(torch.autocast(device_type, dtype, enabled, cache_enabled=False))
            # One by one: `train()` would set the flags of the children too, and models override it to keep a norm
            # frozen.
            for module, training in zip(held.modules, self._training[index], strict=True):
                if module.training != training:
                    stack.callback(setattr, module, "training", module.training)
                    module.training = training
            for position, (holder, name) in zip(self.parameter_positions[index], held.parameters, strict=True):
                stack.callback(TensorPlace(holder, name, leaves[position]).swap(leaves[position]))
            for position, (holder, name) in zip(self.buffer_positions[index], held.buffers, strict=True):
                stack.callback(TensorPlace(holder, name, buffers[position]).swap(buffers[position]))
            yield held

    def no_log_det(self, x1: Tensor) -> Tensor:
        """Return the initial log-determinant: zeros of shape (B,), or an empty tensor if it is not computed."""
        return x1.new_zeros(len(x1) if self.has_log_det else 0, dtype=x1.dtype.to_real())

    def log_det(self, step: Step, x: Tensor, residual: Tensor) -> Tensor | None:
        """Return the log-determinant of a step, or None if it is zero or not wanted."""
        if not self.has_log_det or step.coupling.is_additive:
            return None
        return step.coupling.log_det(x, residual)

    def kept(self, step: Step) -> list[int]:
        """Return the positions of the buffers that a replay must read as the first run did."""
        is_constant, is_scratch = self.known_findings.is_constant, self._is_scratch
        return [
            position
            for position in self.buffer_positions[step.function]
            if not (is_constant[position] or is_scratch[position])
        ]

    def buffers_for_replay(self, constants: Sequence[Tensor]) -> list[Tensor]:
        """Return all buffers, with copies of the ones that steps write to."""
        # Only the shape and dtype of the copies matter: values are restored before each step, and scratch is not read.
        remaining = iter(constants)
        all_places = itertools.chain.from_iterable(self._places(index).buffers for index in range(len(self._functions)))
        return [
            next(remaining) if constant else holder[name].detach().clone()
            for constant, (holder, name) in zip(self.known_findings.is_constant, all_places, strict=True)
        ]


def places(function: nn.Module, attribute: Literal["_parameters", "_buffers"]) -> list[Place]:
    """Return the places where a function's modules hold their parameters or buffers, module by module."""
    return [
        (holder, name)
        for holder in (getattr(module, attribute) for module in function.modules())
        for name, tensor in holder.items()
        if tensor is not None
    ]


def _consecutive(start: int, items: Sequence[Sequence[Any]]) -> list[range]:
    """Return the positions of each sequence's items, if all items follow one another from `start` on."""
    ends = list(itertools.accumulate(map(len, items), initial=start))
    return [range(first, last) for first, last in itertools.pairwise(ends)]


# Numbers --------------------------------------------------------------------------------------------------------------
# A traced graph can hold numbers, but not modules or couplings. Numbers are valid in one process only.

PROGRAMS: dict[int, Program] = {}
_numbers = itertools.count()
# Weak both ways, so that a number does not keep a model alive.
_numbered: "weakref.WeakValueDictionary[int, nn.Module | AbstractCoupling]" = weakref.WeakValueDictionary()
_number_by_instance: "weakref.WeakKeyDictionary[nn.Module | AbstractCoupling, int]" = weakref.WeakKeyDictionary()


@constant_of_object
def number_of(instance: nn.Module | AbstractCoupling) -> int:
    """Return the number of a function or a coupling in traced code. The trace is valid for this object only."""
    number = _number_by_instance.setdefault(instance, next(_numbers))
    _numbered[number] = instance
    return number


@constant_while_tracing
def program_of(
    functions: list[int], steps: list[tuple[int, int, int, str, int, str, bool]], *rest: Any, **more: Any
) -> int:
    """Create a program while tracing, and return its number.

    Args:
        functions: The numbers of the functions.
        steps: For each half-block the fields of a `Step`, with the number of the coupling.
        rest: Additional positional arguments of `Program`.
        more: Keyword arguments of `Program`.
    """
    warn_if_untested()
    modules: list[Any] = [_numbered[number] for number in functions]
    _check(modules)
    program_steps = [Step(*step[:4], _numbered[step[4]], *step[5:]) for step in steps]  # type: ignore[arg-type]
    number = next(_numbers)
    PROGRAMS[number] = Program(modules, program_steps, *rest, **more)
    # Without any one of its functions, no graph that refers to the program can run.
    weakref.finalize(modules[0], PROGRAMS.pop, number, None)
    return number


@constant_while_tracing
def digest_of(program: int) -> str:
    """Return a string that two programs share only if their operators have results of the same number and kind.

    Raises:
        CannotCompileError: The probe found that the program cannot run.
        NotImplementedError: A function raised it in the probe.
        TypeError: A function raised it in the probe, for example because it does not take an argument.
    """
    refusal = PROGRAMS[program].refusal
    if refusal is not None:
        PROGRAMS[program].refusal = None  # Its traceback would keep the functions alive, and they keep the program.
        raise refusal
    return PROGRAMS[program].digest()


@constant_while_tracing
def changing_buffers(program: int) -> list[int]:
    """Return the positions of the buffers that a program writes to."""
    return [position for position, constant in enumerate(PROGRAMS[program].known_findings.is_constant) if not constant]


@constant_while_tracing
def has_log_det(program: int) -> bool:
    """Return whether a program computes a log-determinant."""
    return PROGRAMS[program].has_log_det


def _check(functions: Sequence[nn.Module]) -> None:
    """Raise for functions whose parameters or buffers the operators cannot handle."""
    seen: set[int] = set()
    for function in functions:
        refuse_sharded(function)
        for holder, name in places(function, "_buffers"):
            if id(holder[name]) in seen:
                raise CannotCompileError(
                    f"`{name}` is a buffer of two modules in a compiled reversible sequence; share the whole residual "
                    "function instead, or compile the residual functions only: `block.f.compile(); block.g.compile()`."
                )
            if holder[name].requires_grad:
                raise CannotCompileError(
                    f"`{name}` is a buffer that requires a gradient, which a compiled reversible sequence would lose; "
                    "make it an `nn.Parameter`, or compile the residual functions only: `block.f.compile(); "
                    "block.g.compile()`."
                )
            seen.add(id(holder[name]))
