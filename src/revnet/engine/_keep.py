"""Keep outputs of operators inside a residual function, so that its replay does not run these operators again.

While the function runs for the first time, a dispatch mode keeps the outputs that a rule selects. In the replay,
another mode returns them. An output is identified by its operator, the number of the call of this operator, and what
ran before it, because a function that fills a cache calls more operators in its first run. It is used once and then
freed; if the graph is retained, the next replay computes everything again.

NOTE [ What ran before ]

Either the number of autograd nodes or the number of differentiable operators that return new tensors must be the same.
Hooks of modules add nodes and views in one of the runs, and a batch norm whose statistics are kept calls no operator in
the replay.
Neither number includes casts: autocast may cast a weight in one run, and have the cast in its cache in the other.

NOTE [ What is not kept ]

 - An output that is written to after it was computed. Version counters do not show every write: `(x @ w).mul_(2)`
   writes to a tensor with a counter of its own. So each operator that writes drops all outputs with the same storage.
 - Outputs inside compiled code and custom autograd functions. Kernels of compiled code write to buffers without
   calling an operator. Gradients are disabled there, which is how such code is recognized.
 - Outputs of operators that draw random numbers, which the replay must draw, too.
 - Outputs that share memory with an input, and outputs that are not plain tensors.
 - Outputs that do not require gradients, such as tables, which functions often compute once and remember.
 - Casts, whose number does not say which tensor they are of.

References:
    torch.utils.checkpoint.create_selective_checkpoint_contexts, which takes the same kind of rule.
"""

import abc
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import eq
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext

from revnet._torch_internals import (
    TorchDispatchMode,
    current_dispatch_mode,
    detached_alias,
    next_sequence_number,
    tree_leaves,
    without_current_mode,
)
from revnet.engine._keeper import AbstractKeeper, Function, num_slots
from revnet.engine._tensors import PLAIN, storage_key, version_of
from revnet.errors import ReconstructionError

if TYPE_CHECKING:
    from revnet.engine._record import Saved

_aten = torch.ops.aten
Outputs = tuple[Tensor, ...]


class AbstractKeepRule(abc.ABC):
    """The interface of rules that select the outputs to keep."""

    @abc.abstractmethod
    def candidates(self) -> frozenset[OpOverload] | None:
        """Return the operators whose outputs the rule may select; None for all operators."""

    @abc.abstractmethod
    def selects(self, call: "OperatorCall") -> bool:
        """Return whether to keep the outputs of a call of an operator."""


@dataclass(frozen=True, slots=True, eq=False)
class OperatorCall:
    """One call of an operator in the first run of a function."""

    operator: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Outputs
    result: Any
    """What the operator returned: a tensor, or a tuple or list of them."""
    num_kept_bytes: int
    """Number of bytes that the run keeps so far."""
    num_calls: Counter[OpOverload]
    """Number of calls of each candidate in this function, including this one."""


@dataclass(frozen=True)
class KeepOperators(AbstractKeepRule):
    """Keep the outputs of certain operators.

    Args:
        entries: Sets of operators, each with the number of the only call that counts, from 0 up; None for all calls.
    """

    entries: tuple[tuple[frozenset[OpOverload], int | None], ...]

    def candidates(self) -> frozenset[OpOverload]:
        return frozenset().union(*[operators for operators, _ in self.entries])

    def selects(self, call: OperatorCall) -> bool:
        return any(
            call.operator in operators
            and (number is None or sum([call.num_calls[operator] for operator in operators]) == number + 1)
            for operators, number in self.entries
        )


@dataclass(frozen=True)
class KeepSelected(AbstractKeepRule):
    """Keep the outputs that a function selects.

    Args:
        function: Called with a context, the operator and its arguments, as in
            `torch.utils.checkpoint.create_selective_checkpoint_contexts`. It returns a bool or a `CheckpointPolicy`.
    """

    function: Callable[..., Any]

    def candidates(self) -> None:
        return None

    def selects(self, call: OperatorCall) -> bool:
        context = SelectiveCheckpointContext(is_recompute=False)
        context.op_output = call.result  # Older releases of PyTorch have no such argument.
        answer = self.function(context, call.operator, *call.args, **call.kwargs)
        return answer in (True, CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_SAVE)


@dataclass(frozen=True)
class KeepWithin(AbstractKeepRule):
    """Keep the outputs of certain operators, in the order in which they run, until a number of bytes is reached.

    Args:
        operators: The operators.
        budget_bytes: Most bytes that the outputs of one run may have.
    """

    operators: frozenset[OpOverload]
    budget_bytes: int

    def candidates(self) -> frozenset[OpOverload]:
        return self.operators

    def selects(self, call: OperatorCall) -> bool:
        return call.num_kept_bytes + _num_bytes(call.outputs) <= self.budget_bytes


def _aliases(values: Iterable[Any]) -> list[Any]:
    return [detached_alias(value) if isinstance(value, Tensor) else value for value in values]


def _num_bytes(outputs: Iterable[Tensor]) -> int:
    return sum([output.untyped_storage().nbytes() for output in outputs])


@dataclass(slots=True, eq=False)
class _Entry:
    """The outputs of one call of an operator."""

    result: list[Any]
    """The tensors and other values that the operator returned."""
    kind: type | None
    """Class of the result if it is a tuple or a list; None for a single tensor."""
    num_slots: int
    """Number of tensors that autograd had saved before the call, without those that outlive the function."""
    position: tuple[int, int]
    """Numbers of nodes and of operators before the call; see the note."""
    watched: list[tuple[Tensor, int]]
    """Tensors that share memory with the outputs, and their versions."""
    num_bytes: int

    def is_unmodified(self) -> bool:
        return all(version_of(tensor) == version for tensor, version in self.watched)

    def storage_keys(self) -> set[int | None]:
        return {storage_key(value) for value in self.result if isinstance(value, Tensor)}

    def again(self) -> Any:
        """Return the result as new tensors."""
        values = _aliases(self.result)
        return values[0] if self.kind is None else self.kind(values)


class KeptOutputs(AbstractKeeper):
    """The outputs that one call of a function keeps for its replay.

    Args:
        rule: Selects the outputs.
        num_kept_bytes: The number of bytes that the run keeps, in a list of length 1, which is updated.
    """

    __slots__ = ("_candidates", "_entries", "_rule", "_total")

    def __init__(self, rule: AbstractKeepRule, num_kept_bytes: list[int]):
        self._rule, self._total = rule, num_kept_bytes
        self._candidates = rule.candidates()
        self._entries: dict[tuple[OpOverload, int], _Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def recording(self, function: Function, saved: "Saved") -> Function:
        tensors = saved.tensors
        assert tensors is not None

        def run(*args: Any) -> Any:
            with _Keeping(self, tensors):
                return function(*args)

        return run

    def replaying(self, function: Function, name: str, caught: list[Tensor], lasting: set[int]) -> Function:
        def run(*args: Any) -> Any:
            try:
                # Also if nothing was kept: tensors that PyTorch makes inside an operator, such as the zeros of a
                # dropout with p=1, have other versions under a mode.
                with _Skipping(self, name, partial(num_slots, caught, lasting)):
                    return function(*args)
            finally:
                self._entries.clear()  # The rest is not needed if the replay stops early.

        return run

    def drop(self, result: Any) -> None:
        self.drop_shared_with(tree_leaves(result))

    def drop_shared_with(self, tensors: Iterable[Any]) -> None:
        """Drop the outputs that share memory with one of the tensors."""
        keys = {storage_key(tensor) for tensor in tensors if isinstance(tensor, Tensor)} - {None}
        for key, entry in list(self._entries.items()):
            if keys & entry.storage_keys():
                self._total[0] -= self._entries.pop(key).num_bytes

    def is_candidate(self, operator: OpOverload) -> bool:
        """Return whether the rule may select outputs of this operator."""
        return self._candidates is None or operator in self._candidates

    def add(self, call: OperatorCall, number: int, num_slots: int, position: tuple[int, int]) -> None:
        """Keep the outputs of call `number` of an operator if the rule selects them."""
        if not self._rule.selects(call):
            return
        num_bytes = _num_bytes(call.outputs)
        self._total[0] += num_bytes
        is_single = isinstance(call.result, Tensor)
        values = _aliases([call.result] if is_single else call.result)
        watched = [(value, version_of(value)) for value in values if isinstance(value, Tensor)]
        kind = None if is_single else type(call.result)
        self._entries[call.operator, number] = _Entry(values, kind, num_slots, position, watched, num_bytes)

    def watch(self, base: Tensor, alias: Tensor) -> None:
        """Watch the versions of a tensor that shares memory with `base`, but has a version counter of its own."""
        key = storage_key(base)
        for entry in self._entries.values():
            if key in entry.storage_keys():
                alias = detached_alias(alias)
                entry.watched.append((alias, version_of(alias)))

    def operators(self) -> set[OpOverload]:
        """Return the operators that have kept outputs."""
        return {operator for operator, _ in self._entries}

    def take(self, operator: OpOverload, number: int) -> _Entry | None:
        """Remove and return the outputs of one call; None if there are none, or if they were modified."""
        entry = self._entries.pop((operator, number), None)
        if entry is not None:
            self._total[0] -= entry.num_bytes
        return entry if entry is None or entry.is_unmodified() else None


class _Mode(TorchDispatchMode):
    """The base of both modes, which count the calls of operators."""

    def __init__(self, outputs: KeptOutputs):
        super().__init__()
        self._outputs = outputs
        self._num_calls: Counter[OpOverload] = Counter()
        self._start = next_sequence_number()
        self._num_operators = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        # Otherwise, compiled functions would run without compilation.
        return True

    def _number_of(self, operator: OpOverload) -> int:
        """Return the number of this call of an operator."""
        number = self._num_calls[operator]
        self._num_calls[operator] = number + 1
        return number

    def _position(self) -> tuple[int, int]:
        """Return the numbers of nodes and of operators since the function began."""
        return next_sequence_number() - self._start, self._num_operators

    def _advance(self, operator: OpOverload) -> None:
        """Count an operator that has a node."""
        if operator is _aten._to_copy.default:
            self._start += 1  # A cast makes one node.
        elif _returns_fresh_tensors(operator):
            self._num_operators += 1


def not_keeping() -> AbstractContextManager[Any]:
    """Return a context for code in which there is nothing to keep: operators run without our mode there."""
    return without_current_mode() if isinstance(current_dispatch_mode(), _Mode) else nullcontext()


class _Keeping(_Mode):
    """The mode of a first run."""

    def __init__(self, outputs: KeptOutputs, tensors: list[Tensor]):
        super().__init__(outputs)
        self._tensors = tensors

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        outputs = self._outputs
        num_slots, position = len(self._tensors), self._position()
        result = func(*args, **kwargs)
        if len(outputs):
            places = _written_places(func)
            if places:
                outputs.drop_shared_with(_leaves_at(places, args, kwargs))
            elif func is _aten._unsafe_view.default:
                outputs.watch(args[0], result)
        if torch.is_grad_enabled() and any_requires_grad(args, kwargs):
            self._advance(func)
            if outputs.is_candidate(func):
                number = self._number_of(func)
                tensors = fresh_outputs(func, args, kwargs, result)
                if tensors:
                    call = OperatorCall(func, args, kwargs, tensors, result, outputs._total[0], self._num_calls)
                    outputs.add(call, number, num_slots, position)
        return result


class _Skipping(_Mode):
    """The mode of a replay."""

    def __init__(self, outputs: KeptOutputs, name: str, num_slots: Callable[[], int]):
        super().__init__(outputs)
        self._name, self._num_slots, self._operators = name, num_slots, outputs.operators()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled() and any_requires_grad(args, kwargs):
            position = self._position()
            self._advance(func)
            if func in self._operators:
                entry = self._outputs.take(func, self._number_of(func))
                if entry is not None:
                    self._check_slots(func, entry)
                    if any(map(eq, entry.position, position)):
                        return entry.again()
        return func(*args, **kwargs)

    def _check_slots(self, func: OpOverload, entry: _Entry) -> None:
        """Raise if autograd had saved another number of tensors before the call in the first run."""
        if entry.num_slots != self._num_slots():
            raise ReconstructionError(
                f"`{self._name}` did something else when it ran again: it called `{func}` after autograd had "
                f"saved {self._num_slots()} tensors, and in the forward pass after {entry.num_slots}. A "
                "function whose activations are recomputed must do the same both times (no counters, caches "
                "or conditions that change); otherwise store its activations with the policy `Store()`."
            )


def any_requires_grad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a tensor among the arguments of an operator requires a gradient."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            if value.requires_grad:
                return True
        elif isinstance(value, list | tuple) and any(isinstance(item, Tensor) and item.requires_grad for item in value):
            return True
    return False


def fresh_outputs(func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Outputs:
    """Return the outputs of an operator if `Reverse(keep=...)` can keep them; otherwise an empty tuple."""
    if not _returns_fresh_tensors(func):
        return ()
    if torch.Tag.nondeterministic_seeded in func.tags and _argument(func, "dropout_p", args, kwargs) != 0:
        return ()
    values = (result,) if isinstance(result, Tensor) else result
    if type(values) not in (tuple, list):
        return ()
    outputs = [value for value in values if isinstance(value, Tensor)]
    is_usual = all(type(output) in PLAIN and output.layout is torch.strided for output in outputs)
    return tuple(outputs) if is_usual else ()


@lru_cache(maxsize=4096)
def _returns_fresh_tensors(func: OpOverload) -> bool:
    """Return whether no output of an operator shares memory with an input, and no input is written to."""
    schema = func._schema
    return (
        not schema.is_mutable
        and len(schema.returns) > 0
        and all(output.alias_info is None for output in schema.returns)
        # The first is declared as if it copied, so that its version counter is its own. For the second, see the note.
        and func not in (_aten._unsafe_view.default, _aten._to_copy.default)
    )


@lru_cache(maxsize=4096)
def _written_places(func: OpOverload) -> tuple[tuple[int, str], ...]:
    """Return the positions and names of the arguments that an operator writes to."""
    return tuple(
        [
            (position, argument.name)
            for position, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    )


def _leaves_at(places: Iterable[tuple[int, str]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    leaves: list[Any] = []
    for position, name in places:
        value = args[position] if position < len(args) else kwargs.get(name)
        leaves.extend(value if isinstance(value, tuple | list) else [value])
    return leaves


def _argument(func: OpOverload, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the value of an argument of an operator; None if it has no such argument."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.name == name:
            if position < len(args):
                return args[position]
            with suppress(KeyError):
                return kwargs[name]
            return argument.default_value
    return None
