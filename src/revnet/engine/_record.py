"""One call of a function that keeps none of its activations, and what it takes to run it again.

`RecordedCall.record` runs the function under saved-tensor hooks that leave a *slot* in the autograd graph for each
tensor that autograd wants to save. `RecordedCall.replay` runs it again under hooks that catch the same tensors, and
fills the slots. This file holds what happens in every step; what happens only where a function needs it (state in
buffers, random numbers, tensors from elsewhere, early stops) is in `_careful` and `_restore`.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from operator import attrgetter, is_
from sys import getrefcount
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from revnet.engine import _careful, _inspect
from revnet.engine._batch_norm import ReplayedNorm, replays_faster
from revnet.engine._random import digest, get_random_state, same_random_state
from revnet.engine._restore import AutocastState, autocast_states, restored
from revnet.engine._tensors import version_of, versions_of
from revnet.engine._torch_internals import (
    is_forward_mode,
    next_sequence_number,
    pop_saved_tensors_hooks,
    profiler_is_on,
    push_saved_tensors_hooks,
    set_grad_enabled,
)

_meta_of = attrgetter("shape", "dtype", "device")
_requires_grad = attrgetter("requires_grad")
_device = attrgetter("device")
_flatten = chain.from_iterable
_CPU = torch.device("cpu")
_NO_VERSIONS: dict[int, int] = {}


class SlotFiller(Protocol):
    """What fills the slots of its calls when the backward pass asks for them.

    The autograd graph owns the filler (rule 1): each slot refers to it, and nothing else does.
    """

    @property
    def lock(self) -> AbstractContextManager[Any]:
        """Held while slots are filled and emptied: several devices run several backward threads over one graph."""

    @property
    def is_finished(self) -> bool:
        """Whether the forward pass is over, so that calls can be replayed."""

    def rebuild(self, index: int) -> None:
        """Fill the slots of call number `index`."""


class Saved:
    """What all slots of one call refer to: the filler, and the tensors while they are there.

    A slot is a pair of its `Saved` and its number. A tensor is given away when its slot is read (rule 2).
    """

    __slots__ = ("__weakref__", "constants", "filler", "index", "is_plain", "kept", "tensors", "versions", "was_read")

    def __init__(self, filler: SlotFiller, index: int, tensors: list[Any], versions: list[int]):
        self.filler = filler
        self.index = index
        self.tensors: list[Any] | None = tensors
        self.versions: list[int] | None = versions
        self.constants: dict[int, tuple[Tensor, int]] | None = None
        """Tensors from elsewhere, which are kept and never rebuilt, by the number of their slot."""
        self.is_plain = False
        """Whether no tensor was written to when it was saved, so that reading a slot needs no more than a look."""
        self.kept: list[tuple[Tensor, int, bool]] = []
        """What the function read, with version and `requires_grad`, where that is kept rather than rebuilt."""
        self.was_read = False
        """Whether a slot was read before the forward pass was over, by a function that differentiates inside."""


def _unpack(packed: tuple[Any, int]) -> Tensor:
    """Return the tensor of a slot, or one that outlives the call, guarded as autograd would guard it."""
    owner, number = packed
    if type(owner) is not Saved:
        if version_of(owner) != number:
            raise _careful.modified("a parameter, buffer or argument of a residual function", owner, number)
        return owner  # type: ignore[no-any-return]
    if owner.is_plain:
        if owner.tensors is None:
            with owner.filler.lock:
                if owner.tensors is None:
                    owner.filler.rebuild(owner.index)
        tensors = owner.tensors
        tensor = None if tensors is None else tensors[number]
        if tensor is not None and not tensor._version:
            tensors[number] = None  # One operation of the interpreter, so that no lock is needed.
            return tensor  # type: ignore[no-any-return]
    return _careful.take(owner, number)


class Plan(NamedTuple):
    """What is known of the structure of a residual function in one mode: found once, checked cheaply at each call.

    A plan refers to no parameter. Each call reads the tensors afresh from the places that the plan knows, so that a
    step under `torch.func.functional_call`, FSDP or weight norm, whose parameters are new every time, needs no new one.
    """

    modules: list[nn.Module]
    dicts: list[Any]
    """Where the modules hold parameters, buffers and children, in this order."""
    sizes: list[int]
    children: list[nn.Module | None]
    flag_holders: list[Any]
    get_flag: Callable[[Any], bool]
    training: list[bool]
    parameter_places: list[tuple[Any, str]]
    buffer_places: list[tuple[Any, str]]
    device_list: list[torch.device]
    devices: frozenset[torch.device]
    statistics: list[int]
    """Buffers that the function writes and does not read, as batch norm in training does; by their place."""
    fixed: list[int]
    """Buffers that it reads and does not write, as batch norm in evaluation does."""
    states: list[int]
    """All other buffers."""
    norms: list[ReplayedNorm]
    """Batch norms in training that can run without touching their statistics, which are not among the above."""
    is_scripted: bool
    num_calls: list[int]
    """One number: the calls so far."""
    data_writes: list[int]
    """Parameters that the function was seen to write through `.data`, by their place."""

    def read(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Return the parameters and buffers as they are now; None if the function's structure has changed."""
        dicts, values = self.dicts, _inspect.values_of if self.is_scripted else dict.values
        third = len(self.modules)
        if (
            list(map(self.get_flag, self.flag_holders)) != self.training
            or list(map(len, dicts)) != self.sizes
            or not all(map(is_, _flatten(map(values, dicts[2 * third :])), self.children))
        ):
            return None
        parameters = [each for each in _flatten(map(values, dicts[:third])) if each is not None]
        buffers = [each for each in _flatten(map(values, dicts[third : 2 * third])) if each is not None]
        if (
            len(parameters) != len(self.parameter_places)
            or len(buffers) != len(self.buffer_places)
            or list(map(_device, _flatten((parameters, buffers)))) != self.device_list
        ):
            return None
        return parameters, buffers


class Surroundings:
    """What the functions of one forward pass share.

    Args:
        arguments: The tensors in the further arguments, which outlive the call.
        streams: The streams that the pass begins with.
    """

    __slots__ = ("argument_ids", "argument_versions", "arguments", "autocast", "devices", "is_mixed", "random", "types")

    def __init__(self, arguments: list[Tensor], streams: Sequence[Tensor]):
        self.arguments = arguments
        self.argument_ids = list(map(id, arguments))
        self.argument_versions = versions_of(arguments)
        devices = {_CPU, *map(_device, arguments), *map(_device, streams)}
        self.devices = frozenset([device for device in devices if device.type != "meta"])
        self.types = sorted({device.type for device in devices})
        self.refresh()

    def refresh(self) -> None:
        """Look again at what code between two functions may have changed."""
        self.random: dict[torch.device, Tensor] = {}
        """The random state after the last function, which is the one before the next."""
        self.autocast: tuple[AutocastState, ...] = autocast_states(self.types)
        self.is_mixed = any([state.enabled for state in self.autocast])


class RecordedCall:
    """One call of a function, able to be replayed.

    Args:
        name: The function's place in the model, for errors: "blocks.3.f".
        plan: What is known of the function; made anew if it is None or stale.
        function: The function.
        surroundings: What the calls of one forward pass share.
    """

    __slots__ = (
        "autocast",
        "buffer_versions",
        "buffers",
        "constants",
        "is_mixed",
        "is_plain",
        "lasting",
        "metas",
        "name",
        "parameters",
        "plan",
        "random",
        "requires_grad",
        "results",
        "saved",
        "state_versions",
        "states",
        "stop_after",
        "surroundings",
        "versions",
        "written",
    )

    def __init__(self, name: str, plan: Plan | None, function: nn.Module, surroundings: Surroundings):
        reading = None if plan is None else plan.read()
        if plan is None or reading is None:
            plan = Plan(**_inspect.describe(function))
            reading = plan.read()
            assert reading is not None
        self.name = name
        self.plan = plan
        self.surroundings = surroundings
        self.autocast = surroundings.autocast
        self.is_mixed = surroundings.is_mixed
        self.parameters, self.buffers = reading
        # What lasts is known by the tensor itself, which is held here: no other tensor can take its identity (rule 4).
        self.lasting = {*map(id, self.parameters), *map(id, self.buffers), *surroundings.argument_ids}
        self.versions = versions_of(self.parameters)
        self.requires_grad = list(map(_requires_grad, self.parameters))
        self.random: list[tuple[torch.device, Tensor, int | None]] | None = None
        """For each device on which the function draws: the random state before, and a digest of the one after."""
        self.states: dict[int, Tensor] | None = None
        """Copies of buffers that the function changes, as they were before it, by their place."""
        self.state_versions: dict[int, int] = _NO_VERSIONS
        self.written: dict[int, Tensor] | None = None
        """What a replay begins with for parameters that the function writes, by their place."""
        self.buffer_versions: dict[int, int] | None = None
        """The versions of buffers that must stay as they are, by their place."""
        self.constants: dict[int, tuple[Tensor, int]] | None = None
        self.saved: weakref.ref[Saved] | None = None
        self.metas: list[Any] = []
        """Shape, dtype and device of each saved tensor."""
        self.results: list[Any] = []
        """The same of each tensor that the function returned."""
        self.is_plain = True
        """Whether no saved tensor was written to, and none was read before the forward pass was over."""
        self.stop_after = -1
        """After how many saved tensors a replay may stop; -1 for at the end."""

    def record(
        self,
        filler: SlotFiller,
        index: int,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        sources: tuple[Tensor, ...] = (),
        *,
        may_stop_early: bool = False,
    ) -> Any:
        """Run the function for the first time, leaving slots of `filler`'s call number `index` in the graph.

        Args:
            filler: Fills the slots later.
            index: The number under which `filler` knows this call.
            function: What to call.
            args: Its arguments.
            sources: Inputs that are gone when the call is replayed, which then has others of the same values.
            may_stop_early: Whether a replay may end at the last saved tensor.
        """
        plan, random = self.plan, self.surroundings.random
        checksums = _careful.before(self)
        if self.surroundings.arguments:
            _careful.forget_streams(self, sources)
        devices = self.surroundings.devices | plan.devices
        random_before = [random.get(device) for device in devices]
        if None in random_before:
            random_before = list(map(get_random_state, devices))
        start = next_sequence_number()
        tensors: list[Tensor] = []
        versions: list[int] = []
        saved = Saved(filler, index, tensors, versions)
        nodes: list[int] | None = None
        if may_stop_early or is_forward_mode():
            nodes = []
            pack = _careful.make_pack(self, saved, tensors, versions, nodes)
        else:
            pack = self._make_pack(saved, tensors, versions)
        _careful.push_hooks(pack, _unpack)
        try:
            result = function(*args)
        except BaseException:
            tensors.clear()  # The traceback refers to the hook, which would keep every activation.
            raise
        finally:
            pop_saved_tensors_hooks()
        for device, state in zip(devices, random_before, strict=True):
            random[device] = after = get_random_state(device)
            if not same_random_state(state, after):
                self.random = [*(self.random or []), (device, state, digest(after))]
        if checksums is not None or self.states is not None or versions_of(self.parameters) != self.versions:
            _careful.after(self, checksums)
        self.results = metas_of(result)
        if tensors:
            self._keep_slots(saved, tensors, versions, nodes, (result, *sources), start)
        return result

    def _make_pack(
        self, saved: Saved, tensors: list[Tensor], versions: list[int]
    ) -> Callable[[Tensor], tuple[Any, int]]:
        lasting = self.lasting

        def pack(tensor: Tensor) -> tuple[Any, int]:
            # A miss is harmless: what is not known to last is rebuilt.
            if id(tensor) in lasting or ((base := tensor._base) is not None and id(base) in lasting):
                return tensor, tensor._version
            versions.append(tensor._version)
            tensors.append(tensor)
            return saved, len(tensors) - 1

        return pack

    def _keep_slots(
        self,
        saved: Saved,
        tensors: list[Tensor],
        versions: list[int],
        nodes: list[int] | None,
        own: tuple[Any, ...],
        start: int,
    ) -> None:
        """Note what the slots stand for, and let the tensors go."""
        self.metas = list(map(_meta_of, tensors))
        self.saved = weakref.ref(saved)
        # What a function computes for itself is referred to by this list alone. What others refer to may be a tensor
        # from elsewhere, which a replay would not compute.
        if max(map(getrefcount, tensors)) > _careful.FRESH_COUNT or any([each._base is not None for each in tensors]):
            self.constants = saved.constants = _careful.find_constants(self, tensors, versions, own, start)
        self.is_plain = not (any(versions) or any(versions_of(tensors)) or saved.was_read or is_forward_mode())
        saved.is_plain = self.is_plain and self.constants is None
        if nodes is not None:
            self.stop_after = _careful.stop_after(tensors, nodes, own)
        saved.tensors = saved.versions = None
        # The nodes hold the hook, and the hook this list: a cycle through C++ that no collector sees (rule 1).
        tensors.clear()

    def replay(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        *,
        fill: bool,
        rounded: Tensor | None,
        needs_result: bool = True,
    ) -> Any:
        """Run the function again as the first time, and `fill` the slots that are still there.

        Args:
            function: What to call.
            args: Its arguments, with inputs of the same values as in the first run.
            fill: Whether the backward pass asks for what autograd saved.
            rounded: The input, if it carries the rounding of a reconstruction.
            needs_result: Whether to go on to the end; otherwise the run may stop once the slots are filled (rule 7).

        Returns:
            The result; None if the run stopped early.

        Raises:
            ReconstructionError: The function did something else than the first time (rule 8).
        """
        if (
            versions_of(self.parameters) != self.versions
            or self.buffer_versions is not None
            or self.constants is not None
            or self.surroundings.arguments
        ):
            _careful.check_versions(self)
        caught: list[Tensor] = []
        stop_after = -1 if needs_result else self.stop_after
        versions: list[int] | None = None if self.is_plain and stop_after < 0 else []
        is_as_it_was = self._is_as_it_was()
        with nullcontext(self.lasting) if is_as_it_was else restored(self) as lasting:
            pack: Callable[[Tensor], Any] = caught.append
            if versions is not None:
                pack = _careful.make_replay_pack(self, caught, versions, lasting, stop_after)
            try:
                result = self._call_again(function, args, pack, rounded)
            except _careful.StopReplay:
                result = None
            except BaseException:
                caught.clear()
                raise
            tensors = caught if versions is not None else [each for each in caught if not _lasts(each, lasting)]
        if list(map(_meta_of, tensors)) != self.metas[: None if result is not None else stop_after]:
            _careful.fail_metas(self, list(map(_meta_of, tensors)))
        if result is not None and metas_of(result) != self.results:
            _careful.fail_results(self, metas_of(result))
        saved = self.saved() if fill and self.saved is not None else None
        if saved is not None:
            saved.tensors, saved.versions = list(tensors), versions
            if self.constants is not None:
                _careful.check_constants(self, saved.tensors)
        caught.clear()  # See `_keep_slots`: the nodes of this second run hold the hook, too.
        return result

    def _is_as_it_was(self) -> bool:
        """Return whether everything that the function depends on is as it was in its first run (rule 4)."""
        if self.random or self.states or self.written or self.plan.statistics or self.is_mixed:
            return False
        reading = self.plan.read()
        return (
            reading is not None
            and all(map(is_, reading[0], self.parameters))
            and all(map(is_, reading[1], self.buffers))
            and list(map(_requires_grad, self.parameters)) == self.requires_grad
            and not any([torch.is_autocast_enabled(state.device_type) for state in self.autocast])
        )

    def _call_again(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        pack: Callable[[Tensor], Any],
        rounded: Tensor | None,
    ) -> Any:
        """Call the function with gradients and hooks, so that its batch norms do not count the batch twice."""
        norms = self.plan.norms
        is_faster = bool(norms) and rounded is not None and not self.is_mixed and replays_faster(rounded)
        flags = [norm.attributes["track_running_stats"] for norm in norms]
        has_grad = torch.is_grad_enabled()
        push_saved_tensors_hooks(pack, _identity)
        try:
            set_grad_enabled(True)
            for norm in norms:
                norm.attributes["track_running_stats"] = False
                if (forward := norm.faster if is_faster else norm.forward) is not None:
                    norm.attributes["forward"] = forward
            if profiler_is_on():
                with torch.profiler.record_function(f"revnet: replay {self.name}"):
                    return function(*args)
            return function(*args)
        finally:
            for norm, flag in zip(norms, flags, strict=True):
                norm.attributes["track_running_stats"] = flag
                norm.attributes.pop("forward", None)
            set_grad_enabled(has_grad)
            pop_saved_tensors_hooks()

    def keep(self, inputs: list[tuple[Tensor, int, bool]]) -> None:
        """Keep what the function read for as long as there are slots."""
        saved = None if self.saved is None else self.saved()
        if saved is not None:
            saved.kept = inputs

    def kept(self) -> list[tuple[Tensor, int, bool]]:
        """Return what the function read."""
        saved = None if self.saved is None else self.saved()
        return [] if saved is None else saved.kept

    def is_alive(self) -> bool:
        """Return whether a backward pass can still ask for any of the slots."""
        return self.saved is not None and self.saved() is not None

    def empty(self) -> None:
        """Forget the tensors of the slots."""
        saved = None if self.saved is None else self.saved()
        if saved is not None:
            saved.tensors = saved.versions = None


def metas_of(result: Any) -> list[Any]:
    """Return shape, dtype and device of the tensors that a function returned."""
    if isinstance(result, Tensor):
        return [_meta_of(result)]
    return [_meta_of(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def _lasts(tensor: Tensor, lasting: set[int]) -> bool:
    return id(tensor) in lasting or ((base := tensor._base) is not None and id(base) in lasting)


def _identity(tensor: Tensor) -> Tensor:
    return tensor

