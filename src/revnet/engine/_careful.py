"""The parts of recording and replaying that only some functions need, and the errors of both.

Random numbers, tensors from outside the function, writes to saved tensors and forward-mode differentiation are rare.
`_record` and `_replay` check cheaply for them, and call this file if they find one.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter
from sys import getrefcount
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from revnet._torch_internals import (
    HAS_ACCELERATOR,
    FakeTensor,
    assert_async,
    forward_mode_level,
    hooks_are_disabled,
    never_compile,
    next_sequence_number,
    sequence_number_of,
    tree_leaves,
)
from revnet.engine._random import RandomStates, by_device, digest, same_random_state
from revnet.engine._tensors import storage_key, version_of
from revnet.engine._tracing import refuse
from revnet.errors import ReconstructionError

if TYPE_CHECKING:
    from revnet.engine._record import RecordedCall, Saved
    from revnet.engine._surroundings import Surroundings

_base_of = attrgetter("_base")
# Without an accelerator, every tensor is on the CPU.
meta_of = attrgetter("shape", "dtype", "device") if HAS_ACCELERATOR else attrgetter("shape", "dtype")


# Slots ----------------------------------------------------------------------------------------------------------------


def no_hooks(error: RuntimeError) -> RuntimeError:
    """Return the error for a transform of `torch.func`, or for a user, who forbids saved-tensor hooks."""
    reason = hooks_are_disabled()
    if reason is None:
        return error
    if "torch.func" not in reason:
        return RuntimeError(
            f"saved-tensor hooks, which rebuild the activations of a reversible sequence, are disabled ({reason}); "
            "call it outside of `torch.autograd.graph.disable_saved_tensors_hooks`, or store its activations with "
            "`set_policy(model, Store())`."
        )
    return RuntimeError(
        "a reversible sequence cannot be differentiated by `torch.func.grad`, `vjp`, `jacrev` or `vmap` of them, since "
        "they forbid the saved-tensor hooks that rebuild its activations; store the activations with "
        "`set_policy(model, Store())`, or use `torch.autograd.grad`."
    )


def failed(error: BaseException, saved: "Saved") -> None:
    """Free what a call has saved, and explain an error that comes from the hooks of the library.

    The traceback refers to the hook, which would keep every activation alive.

    Raises:
        RuntimeError: A residual function uses a transform of `torch.func`.
    """
    for tensors in (saved.tensors or [], saved.bases):
        tensors.clear()
    if isinstance(error, RuntimeError) and "yet support saved tensor hooks" in str(error):
        raise RuntimeError(
            "a residual function of a reversible sequence uses `torch.func.grad`, `vjp`, `jacrev` or `vmap` of them, "
            "which forbid the saved-tensor hooks that rebuild activations; use `torch.autograd.grad` with "
            "`create_graph=True` in the function, or store the activations with `set_policy(model, Store())`."
        ) from error


def take(saved: "Saved", number: int) -> Tensor:
    """Return the tensor of a slot, and rebuild it if necessary."""
    refuse_compiled_autograd()
    with saved.filler.lock:
        if saved.constants is not None and number in saved.constants:
            tensor, version = saved.constants[number]
            if version_of(tensor) != version:
                raise modified("a tensor that a residual function computed with", tensor, version)
            return tensor
        is_finished = saved.filler.is_finished
        if saved.tensors is None or saved.tensors[number] is None:
            saved.filler.rebuild(saved.index)
        assert saved.tensors is not None
        rebuilt: Tensor = saved.tensors[number]
        expected = 0 if saved.versions is None else saved.versions[number]
        if version_of(rebuilt) != expected:  # Written to since it was saved; autograd would raise, too.
            raise modified("a tensor that a residual function computed with", rebuilt, expected)
        # Before the end of the forward pass, a function that differentiates inside itself may read it again, and
        # nothing could rebuild it.
        if is_finished:
            saved.tensors[number] = None
        else:
            saved.was_read = True
        return rebuilt


def refuse_compiled_autograd() -> None:
    """Raise in a backward pass that `torch.compile` traces."""
    if torch.compiler.is_dynamo_compiling():
        refuse(
            "the backward pass of a reversible sequence cannot be compiled by compiled autograd; turn it off with "
            "`torch._dynamo.config.compiled_autograd = False`, or compile the model as a whole."
        )


def check_finished(is_finished: bool) -> None:
    """Raise if the forward pass has not ended."""
    if not is_finished:
        raise ReconstructionError(
            "the backward pass reached a reversible sequence whose forward pass has not finished; call `backward` "
            "outside of the residual functions."
        )


def lasting_test(call: "RecordedCall", lasting: set[int]) -> Callable[[Tensor], bool]:
    """Return a test of whether a tensor outlives the call. A missed tensor is rebuilt, which is harmless."""
    if forward_mode_level() < 0:
        return lambda tensor: id(tensor) in lasting or id(tensor._base) in lasting
    # Forward mode saves the primal of a dual tensor, which is a different object with the same storage.
    known = (*call.parameters, *call.buffers, *call.surroundings.arguments)
    keys = {storage_key(tensor) for tensor in known} - {None}
    return lambda tensor: id(tensor) in lasting or storage_key(tensor) in keys


def make_pack(call: "RecordedCall", saved: "Saved") -> Callable[[Tensor], int]:
    """Return a hook for a first run in forward mode that records what `Saved.pack_and_note` records."""
    is_lasting = lasting_test(call, call.lasting)
    tensors, versions = saved.tensors, saved.versions
    assert tensors is not None
    assert versions is not None

    def pack(tensor: Tensor) -> int:
        if is_lasting(tensor):
            saved.others.append((tensor, version_of(tensor)))
            return -len(saved.others)
        versions.append(version_of(tensor))
        tensors.append(tensor)
        saved.nodes.append(next_sequence_number())
        return len(tensors) - 1

    return pack


def make_replay_pack(
    call: "RecordedCall",
    caught: list[Tensor],
    versions: list[int],
    lasting: set[int],
    stop_after: int,
    stop: type[BaseException],
) -> Callable[[Tensor], Tensor]:
    """Return a hook for a replay that records versions, and raises `stop` after `stop_after` tensors."""
    is_lasting = lasting_test(call, lasting)

    def pack(tensor: Tensor) -> Tensor:
        if is_lasting(tensor):
            return tensor
        # Returned, because a function that differentiates inside itself asks for it. Detached, because a node that
        # holds its own output keeps itself alive.
        tensor = tensor.detach()
        caught.append(tensor)
        versions.append(version_of(tensor))
        if len(caught) == stop_after:
            raise stop
        return tensor

    return pack


def identity(tensor: Tensor) -> Tensor:
    """Return the tensor: the hook that unpacks what a replay has saved."""
    return tensor


for _maker in (make_pack, make_replay_pack, lasting_test):
    never_compile(_maker)


def find_constants(
    call: "RecordedCall", tensors: Sequence[Tensor], versions: Sequence[int], own: Sequence[Any], start: int
) -> dict[int, tuple[Tensor, int]] | None:
    """Return the saved tensors that existed before the call, with their versions, by their number.

    Such a tensor is not a parameter, buffer or argument, and a replay would not compute it. Something outside the call
    refers to it (or to the tensor that it is a view of), and this call created no node for it.
    """
    if forward_mode_level() >= 0:
        return None  # Tangents exist only within their level.
    bases = list(map(_base_of, tensors))
    # With `map`, since a loop variable would count as one more reference.
    counts, base_counts = list(map(getrefcount, tensors)), list(map(getrefcount, bases))
    casts = {state.dtype for state in call.autocast if state.enabled}
    own_keys: set[int | None] = set()
    constants: dict[int, tuple[Tensor, int]] = {}
    for number, (tensor, base) in enumerate(zip(tensors, bases, strict=True)):
        origin, count = (tensor, counts[number]) if base is None else (base, base_counts[number])
        if origin.grad_fn is not None and sequence_number_of(origin.grad_fn) >= start:
            continue  # The call computed it.
        uses = sum([tensor is origin for tensor in (*tensors, *bases)])
        is_base = any(tensor is origin for tensor in bases)  # A view in C++ refers to it, too.
        if count <= (FRESH_BASE_COUNT if is_base else FRESH_COUNT) - 1 + uses:
            continue  # Only the two lists refer to it.
        if tensor.dtype in casts:
            continue  # Autocast caches what it has cast for a while, and casts again later.
        own_keys = own_keys or {storage_key(value) for value in own if isinstance(value, Tensor)}
        if tensor.layout is not torch.strided or storage_key(tensor) in own_keys:
            continue
        if origin.untyped_storage().nbytes() < tensor.nbytes:
            continue  # FSDP has freed a parameter's memory, and brings it back for the next call.
        constants[number] = (tensor.detach(), versions[number])
    return constants or None


def check_constants(call: "RecordedCall", tensors: list[Any]) -> None:
    """Remove the kept tensors from a replay's tensors, and raise if the replay used different ones."""
    assert call.constants is not None
    for number, (constant, _) in call.constants.items():
        if number >= len(tensors):
            continue
        # A function may compute it again and replace the old one, which is then equal up to rounding.
        # A fake tensor that represents a real one is a new one in each run, and has no values.
        if storage_key(tensors[number]) != storage_key(constant) and not isinstance(constant, FakeTensor):
            is_different = _differ(tensors[number], constant)
            if call.surroundings.is_captured:
                assert_async(~is_different, f"`{call.name}` {_OTHER_TENSOR}")
            elif is_different:
                fail(call, _OTHER_TENSOR)
        tensors[number] = None


_OTHER_TENSOR = "used a different tensor, which is not one of its parameters, buffers and arguments"


def _differ(tensor: Tensor, other: Tensor) -> Tensor:
    """Return whether two tensors differ by more than a reconstruction does."""
    tensor, other = tensor.detach().double(), other.detach().double()
    return (tensor - other).norm() > 1e-2 * other.norm()


def _fresh_counts() -> tuple[int, int]:
    """Return the reference counts of a tensor that only a list holds: alone, and as the base of a view.

    They are measured, because they depend on the versions of Python and PyTorch.
    """
    tensors = [torch.empty(1, device="cpu")]
    views = [torch.empty(1, device="cpu").view(1)]
    bases = list(map(_base_of, views))
    return max(map(getrefcount, tensors)), max(map(getrefcount, bases))


FRESH_COUNT, FRESH_BASE_COUNT = _fresh_counts()


def moved(
    surroundings: "Surroundings", before: RandomStates, after: RandomStates
) -> list[tuple[torch.device, Tensor, int | None]] | None:
    """Return the devices whose random state has changed, with the state before and a digest of the state after."""
    pairs = zip(by_device(surroundings.others, before), by_device(surroundings.others, after), strict=True)
    # The state after is only compared and never set, so a number suffices.
    changed: list[tuple[torch.device, Tensor, int | None]] = [
        (device, old, digest(new)) for (device, old), (_, new) in pairs if not same_random_state(old, new)
    ]
    return changed or None


# Errors ---------------------------------------------------------------------------------------------------------------


def check_versions(call: "RecordedCall") -> None:
    """Raise if a parameter, buffer, argument or constant has a different version from the one after the first run.

    Raises:
        ReconstructionError: It was modified in place after the forward pass.
    """
    surroundings = call.surroundings
    pairs = [
        *zip(call.parameters, call.versions, strict=True),
        *zip(surroundings.arguments, surroundings.argument_versions, strict=True),
        *[(call.buffers[place], version) for place, version in (call.buffer_versions or {}).items()],
        *(call.constants or {}).values(),
    ]
    for tensor, version in pairs:
        if version_of(tensor) != version:
            raise ReconstructionError(
                f"a parameter, buffer or argument of shape {tuple(tensor.shape)} was modified in place after the "
                f"forward pass (version {version_of(tensor)}, expected {version}), so the activations of "
                f"`{call.name}` cannot be rebuilt; run `backward` before modifying it, for instance before "
                "`optimizer.step()`."
            )


def fail_metas(call: "RecordedCall", metas: list[Any]) -> NoReturn:
    """Raise because a replay saved different tensors."""
    for actual, expected in zip(metas, call.metas, strict=False):
        if actual != expected:
            fail(call, f"saved {_described(actual)} where the forward pass saved {_described(expected)}")
    if len(metas) > len(call.metas):
        fail(call, f"saved more than the {len(call.metas)} tensors that the forward pass saved")
    fail(call, f"saved {len(metas)} tensors where the forward pass saved {len(call.metas)}")


def fail_results(call: "RecordedCall", metas: list[Any]) -> NoReturn:
    """Raise because a replay returned a different kind of result."""
    actual, expected = [", ".join(map(_described, of_run)) or "no tensor" for of_run in (metas, call.results)]
    fail(call, f"returned {actual} where the forward pass returned {expected}")


def fail(call: "RecordedCall", difference: str) -> NoReturn:
    """Raise because a function did not repeat its first run."""
    raise ReconstructionError(
        f"`{call.name}` did something else when it ran again: it {difference}. A function whose activations are "
        "recomputed must do the same both times (no counters, caches or conditions that change); otherwise store "
        "its activations with the policy `Store()`."
    )


def modified(what: str, tensor: Tensor, version: int) -> RuntimeError:
    """Return the error that autograd raises for a saved tensor that was written to."""
    return RuntimeError(
        f"one of the variables needed for gradient computation has been modified by an inplace operation: {what}, of "
        f"shape {tuple(tensor.shape)}, is at version {version_of(tensor)}; expected version {version} instead."
    )


def metas_of(result: Any) -> list[Any]:
    """Return the shape, dtype and device of the tensors that a function returned."""
    return [meta_of(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def not_the_same(name: str, how: str) -> ReconstructionError:
    """Return the error for a function that returns different numbers when it runs again."""
    return ReconstructionError(
        f"`{name}` returned different numbers when it ran again, {how}: it draws random numbers outside of PyTorch or "
        "from a generator of its own, keeps state in attributes, or reads a tensor that has changed since the forward "
        "pass. Draw from PyTorch's global generator, keep state in buffers, pass tensors as arguments, or store the "
        "block's activations with the policy `Store()`."
    )


def modified_output(tensor: Tensor, version: int) -> ReconstructionError:
    """Return the error for a final stream that was written to."""
    return ReconstructionError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: an output of "
        f"a reversible sequence, of shape {tuple(tensor.shape)}, is at version {version_of(tensor)}; expected version "
        f"{version}. The activations are rebuilt from that output: use the operation's out-of-place form, or the "
        "policy `Store()` for the last block."
    )


def modified_stream(reader: str, tensor: Tensor, version: int) -> ReconstructionError:
    """Return the error for a stream that was kept because a function reads it, and was written to."""
    return ReconstructionError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: the stream "
        f"that `{reader}` read, of shape {tuple(tensor.shape)}, is at version {version_of(tensor)}; expected version "
        f"{version} instead. Use the operation's out-of-place form."
    )


def overwritten_output(tensor: Tensor) -> ReconstructionError:
    """Return the error for a final stream that was overwritten without raising its version."""
    return ReconstructionError(
        f"an output of a reversible sequence, of shape {tuple(tensor.shape)}, was overwritten after the forward pass, "
        "through `.data`, NumPy or the like; the activations are rebuilt from that output: `clone` it before writing, "
        "or use the policy `Store()` for the last block."
    )


def freed_output(tensor: Tensor) -> ReconstructionError:
    """Return the error for a final stream whose memory was freed."""
    return ReconstructionError(
        f"the memory of an output of a reversible sequence, of shape {tuple(tensor.shape)}, was freed after the "
        "forward pass (`untyped_storage().resize_(0)`), so the activations cannot be rebuilt; restore it before "
        "`backward`, or store the last block's activations with the policy `Store()`."
    )


def _described(meta: tuple[Any, ...]) -> str:
    shape, dtype, *device = meta
    return f"{tuple(shape)} {dtype}" + "".join(f" on {where}" for where in device)
