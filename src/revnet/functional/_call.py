"""One call of a function that keeps none of its activations, and what it takes to compute them again.

The call runs under saved-tensor hooks that leave a slot in the autograd graph for each tensor that autograd wants to
save. `Call.repeat` runs the function again under hooks that catch the same tensors, and fills the slots. A `Run` owns
calls, and knows where their inputs come from: rebuilt from the outputs of blocks, or kept.
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from revnet.engine._refusal import refuse
from revnet.errors import ReconstructionError
from revnet.functional._recompute import Conditions
from revnet.functional._storage import storage_key, version_of


class Run(Protocol):
    """What fills the slots of its calls when the backward pass asks for them.

    The autograd graph owns the run: each slot refers to it, and nothing else does, so it is freed with the graph. The
    run refers to the slots weakly.
    """

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held while slots are filled and emptied: several devices run several backward threads over one graph."""

    @property
    def is_finished(self) -> bool:
        """Whether the forward pass is over, so that calls can be repeated."""

    def rebuild(self, index: int) -> None:
        """Fill the slots of call number `index`."""


class Call:
    """One call of a function: how to repeat it, and the slots of what autograd saved.

    Args:
        name: The function's place in the model, for errors: "blocks.3.f".
        conditions: What the function depends on beside its input, made just now.
    """

    def __init__(self, name: str, conditions: Conditions):
        self._name = name
        self._conditions = conditions
        self._slots: list[weakref.ref[_Slot]] = []
        self._layouts: list[_Layout] = []
        self._origins: list[_Origin] = []
        self._nodes: list[int] = []  # The place in the graph of the operation that saved the slot's tensor,
        self._is_complete: list[bool] = []  # and whether it was certainly computed by then.
        self._constants: dict[int, Tensor] = {}  # By the number of the slot, tensors that were there before the call.
        self._result: list[_Layout] = []

    def first(self, run: Run, index: int, compute: Callable[[], Any], sources: Sequence[Tensor] = ()) -> Any:
        """Compute for the first time, leaving slots of `run`'s call number `index` in the graph.

        Args:
            run: Who will fill the slots.
            index: The number under which `run` knows this call.
            compute: Calls the function.
            sources: Inputs that are gone when the call is repeated, which then has others of the same values.
        """

        def pack(tensor: Tensor) -> "_Slot | _Lasting":
            if self._conditions.is_lasting(tensor):
                return _Lasting(tensor, version_of(tensor))
            # Filled until the function is done, for those that differentiate inside themselves.
            slot = _Slot(run, index, tensor)
            self._slots.append(weakref.ref(slot))
            self._layouts.append(_Layout.of(tensor))
            self._origins.append(_Origin(tensor))
            self._nodes.append(torch._C._autograd._get_sequence_nr())
            self._is_complete.append(tensor.grad_fn is not None or storage_key(tensor) in source_keys)
            return slot

        source_keys = {storage_key(source) for source in sources}
        start = torch._C._autograd._get_sequence_nr()
        with saved_tensors_hooks(pack, _unpack):
            result = compute()
        self._conditions.settle()
        results = _tensors_of(result)
        self._result = [_Layout.of(tensor) for tensor in results]
        self.empty_slots()
        self._keep_what_is_not_its_own(start, [*results, *sources])
        return result

    def repeat(self, compute: Callable[[], Any], *, fill: bool, is_rounded: bool, needs_result: bool) -> Any:
        """Compute again as the first time, and `fill` the slots that are still there.

        Args:
            compute: Calls the function with an input of the same values.
            fill: Whether somebody asks for what autograd saved.
            is_rounded: Whether the input carries the rounding of a reconstruction.
            needs_result: Whether to go on to the end; else the computation may stop once the slots are filled.

        Returns:
            The result; None if it is not needed.

        Raises:
            ReconstructionError: The function did something else than the first time.
        """
        count = 0
        enough = -1 if needs_result else self._num_until_end()

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            if self._conditions.is_lasting(tensor):
                return tensor
            self._check(count, tensor)
            slot = self._slots[count]() if fill else None
            count += 1
            tensor = tensor.detach()
            if slot is not None and not slot.is_constant:
                slot.fill(tensor)
            if count == enough:
                raise _Enough
            return tensor

        try:
            with torch.enable_grad(), self._conditions.restored(is_rounded), saved_tensors_hooks(pack, _identity):
                result = compute()
        except _Enough:
            return None
        if count != len(self._slots):
            self._fail(f"saved {count} tensors where the forward pass saved {len(self._slots)}")
        layouts = [_Layout.of(tensor) for tensor in _tensors_of(result)]
        if layouts != self._result:
            self._fail(f"returned {_listed(layouts)} where the forward pass returned {_listed(self._result)}")
        return result if needs_result else None

    def saved_anything(self) -> bool:
        """Whether autograd saved what a backward pass can ask for."""
        return bool(self._slots)

    def has_slots(self) -> bool:
        """Whether a backward pass can still ask for any of the slots."""
        return any(slot() is not None for slot in self._slots)

    def empty_slots(self) -> None:
        """Forget the tensors of the slots that are still there."""
        for reference in self._slots:
            slot = reference()
            if slot is not None and not slot.is_constant:
                slot.tensor = None

    def _num_until_end(self) -> int:
        """After how many saved tensors nothing more is needed; -1 if the function must run to its end.

        An operation saves its inputs before it computes, so the last one need not compute at all. But some save room
        for what they are about to compute (RReLU's noise): those must.
        """
        last = max((number for number, slot in enumerate(self._slots) if slot() is not None), default=None)
        if last is None:
            return -1
        of_last = [each for each, node in enumerate(self._nodes[: last + 1]) if node == self._nodes[last]]
        return last + 1 if all(self._is_complete[each] for each in of_last) else -1

    def _keep_what_is_not_its_own(self, start: int, own: Iterable[Tensor]) -> None:
        """Let slots keep tensors that were there before the call, and watch them as parameters are watched."""
        if forward_ad._current_level >= 0:
            return  # Tangents come and go with their level.
        keys = {storage_key(tensor) for tensor in own}
        for number, (reference, origin) in enumerate(zip(self._slots, self._origins, strict=True)):
            slot, tensor = reference(), origin.find(start)
            if slot is None or tensor is None or storage_key(tensor) in keys:
                continue
            if not self._conditions.may_be_cast(tensor):  # Autocast keeps those for a while, and casts again.
                slot.tensor, slot.is_constant = tensor, True
                self._constants[number] = tensor
                self._conditions.watch(tensor, slot.version)
        self._origins.clear()

    def _check(self, count: int, tensor: Tensor) -> None:
        """Raise unless `tensor` can be the one that the forward pass saved as number `count`."""
        if count >= len(self._slots):
            self._fail(f"saved more than the {len(self._slots)} tensors that the forward pass saved")
        if not self._layouts[count].fits(tensor):
            self._fail(f"saved {_Layout.of(tensor)} where the forward pass saved {self._layouts[count]}")
        constant = self._constants.get(count)
        if constant is not None and storage_key(tensor) != storage_key(constant) and _differ(tensor, constant):
            # A function may compute it anew and put it in the old one's place; then it is the same but for rounding.
            self._fail("used another tensor, which is none of its parameters, buffers and arguments")

    def _fail(self, difference: str) -> NoReturn:
        raise ReconstructionError(
            f"`{self._name}` did something else when it ran again: it {difference}. A function whose activations are "
            "computed again must do the same both times (no counters, caches or conditions that change); otherwise "
            "keep its activations with the policy `Store()`."
        )


class _Enough(BaseException):
    """All slots are filled: nobody reads what the function computes from here on. Not for it to catch."""


class _Slot:
    """What the autograd graph holds in place of a saved tensor."""

    __slots__ = ("__weakref__", "_version", "index", "is_constant", "run", "tensor")

    def __init__(self, run: Run, index: int, tensor: Tensor):
        self.run = run
        self.index = index
        self.is_constant = False
        """Whether the tensor is none of the function's own, so that it stays and is never rebuilt."""
        self.fill(tensor)

    @property
    def version(self) -> int:
        return self._version

    def fill(self, tensor: Tensor) -> None:
        self.tensor: Tensor | None = tensor
        self._version = version_of(tensor)

    def unpack(self) -> Tensor:
        """The tensor, rebuilt if it is not there; it is given away, and rebuilt if asked for again."""
        with self.run.lock:
            is_finished = self.run.is_finished
            if self.tensor is None:
                if not is_finished:
                    raise ReconstructionError(
                        "backward reached a reversible sequence whose forward pass has not finished; call it outside "
                        "of the residual functions."
                    )
                self.run.rebuild(self.index)
            tensor = self.tensor
            assert tensor is not None
            if version_of(tensor) != self._version:  # It was written to since it was saved; autograd would raise too.
                raise RuntimeError(_modified("a tensor that a residual function computed with", tensor, self._version))
            if is_finished and not self.is_constant:
                self.tensor = None
            return tensor


class _Lasting(NamedTuple):
    """A saved tensor that outlives the call anyway: kept as it is, and guarded as autograd would guard it."""

    tensor: Tensor
    version: int

    def unpack(self) -> Tensor:
        if version_of(self.tensor) != self.version:
            raise RuntimeError(_modified("a parameter, buffer or argument of a residual function", *self))
        return self.tensor


class _Origin:
    """Tells, once a function is done, whether a tensor that autograd saved is none of those that it computed.

    What the function computed for itself is gone by then, or has a later place in the graph. What is still there was
    there before: a tensor that is no parameter, buffer or argument.
    """

    __slots__ = ("_geometry", "_reference")

    def __init__(self, tensor: Tensor):
        base = tensor._base if tensor._is_view() else None
        self._reference = weakref.ref(tensor if base is None else base)
        self._geometry = None if base is None else (tensor.shape, tensor.stride(), tensor.storage_offset())

    def find(self, start: int) -> Tensor | None:
        """The tensor, if somebody keeps it who had it at place `start` of the graph; apart from that graph."""
        tensor = self._reference()
        if tensor is None or (tensor.grad_fn is not None and tensor.grad_fn._sequence_nr() >= start):
            return None
        if tensor.layout is not torch.strided:
            return None
        if tensor.untyped_storage().nbytes() < tensor.nbytes:
            return None  # FSDP has taken a parameter's memory away, and will bring it back for the next call.
        tensor = tensor.detach()
        return tensor if self._geometry is None else tensor.as_strided(*self._geometry)


class _Layout(NamedTuple):
    """What a recomputed tensor must share with the one of the forward pass."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> "_Layout":
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def fits(self, tensor: Tensor) -> bool:
        return tensor.shape == self.shape and tensor.dtype == self.dtype and tensor.device == self.device

    def __str__(self) -> str:
        return f"{tuple(self.shape)} {self.dtype} on {self.device}"


def _tensors_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [x for x in tree_leaves(result) if isinstance(x, Tensor)]


def _listed(layouts: Iterable[_Layout]) -> str:
    return ", ".join(map(str, layouts)) or "no tensor"


def _modified(what: str, tensor: Tensor, version: int) -> str:
    return (
        f"one of the variables needed for gradient computation has been modified by an inplace operation: {what}, of "
        f"shape {tuple(tensor.shape)}, is at version {version_of(tensor)}; expected version {version} instead."
    )


def _unpack(packed: _Slot | _Lasting) -> Tensor:
    if torch.compiler.is_dynamo_compiling():
        refuse(
            "the backward pass of a reversible sequence cannot be compiled by compiled autograd; run `backward` outside "
            "of it (`torch._dynamo.config.compiled_autograd = False`), or compile the model as a whole."
        )
    return packed.unpack()


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _differ(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by more than rebuilding does."""
    tensor, other = tensor.detach().double(), other.detach().double()
    return bool((tensor - other).norm() > 1e-2 * other.norm())
