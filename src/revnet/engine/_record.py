"""One call of a function that keeps none of its activations, and what it takes to run it again.

`RecordedCall.record` runs the function under saved-tensor hooks that leave a *slot* in the autograd graph for each
tensor that autograd wants to save. `replay` (in `_replay`) runs it again under hooks that catch the same tensors, and
fills the slots. These two files hold what happens in every step; what happens only where a function needs it (state in
buffers, random numbers, tensors from elsewhere, early stops) is in `_careful` and `_restore`.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from operator import attrgetter, is_
from sys import getrefcount
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from revnet._torch_internals import (
    HAS_ACCELERATOR,
    forward_mode_level,
    never_compile,
    next_sequence_number,
    pop_saved_tensors_hooks,
    push_saved_tensors_hooks,
    sequence_number_of,
)
from revnet.engine import _careful, _inspect
from revnet.engine._batch_norm import ReplayedNorm
from revnet.engine._careful import CHECKSUM_INTERVAL, FRESH_COUNT
from revnet.engine._digest import Digest, can_digest, digest_of, has_memory
from revnet.engine._random import ONLY_CPU, compare_bytes, cpu_random_state, get_random_state
from revnet.engine._restore import AutocastState, autocast_states
from revnet.engine._tensors import versions_of

meta_of = attrgetter("shape", "dtype", "device") if HAS_ACCELERATOR else attrgetter("shape", "dtype")
_version = attrgetter("_version")
_base_of = attrgetter("_base")
_requires_grad = attrgetter("requires_grad")
_device = attrgetter("device")
_flatten = chain.from_iterable
_values = dict.values
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


def _unpack(packed: tuple[Any, int]) -> Any:
    """Return the tensor of a slot, or one that outlives the call, guarded as autograd would guard it."""
    owner, number = packed
    if type(owner) is not Saved:
        if owner._version != number:
            raise _careful.modified("a parameter, buffer or argument of a residual function", owner, number)
        return owner
    if owner.is_plain:
        if owner.tensors is None:
            if torch.compiler.is_dynamo_compiling():
                _careful.refuse_compiled_autograd()
            with owner.filler.lock:
                if owner.tensors is None:
                    owner.filler.rebuild(owner.index)
        tensors = owner.tensors
        tensor = None if tensors is None else tensors[number]
        if tensors is not None and tensor is not None and not tensor._version:
            tensors[number] = None  # One operation of the interpreter, so that no lock is needed.
            return tensor
    return _careful.take(owner, number)


class Plan(NamedTuple):
    """What is known of the structure of a residual function in one mode: found once, checked cheaply at each call.

    A plan refers to no parameter. Each call reads the tensors afresh from the places that the plan knows, so that a
    step under `torch.func.functional_call`, FSDP or weight norm, whose parameters are new every time, needs no new one.
    """

    modules: list[nn.Module]
    dicts: list[Any]
    """Where the modules hold parameters, buffers and children."""
    sizes: list[int]
    filled_dicts: list[Any]
    """The dicts that are not empty."""
    types: list[type]
    """The types of all that they hold, None included."""
    children: Sequence[nn.Module]
    pick_parameters: Callable[[list[Any]], Sequence[Tensor]]
    pick_buffers: Callable[[list[Any]], Sequence[Tensor]]
    pick_children: Callable[[list[Any]], Sequence[nn.Module]]
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
    num_calls: list[int]
    """One number: the calls so far."""
    data_writes: list[int]
    """Parameters that the function was seen to write through `.data`, by their place."""

    def read(self) -> list[Any] | None:
        """Return what the modules hold now, None if the function's structure has changed."""
        if (
            list(map(self.get_flag, self.flag_holders)) != self.training
            or list(map(len, self.dicts)) != self.sizes
            or list(map(type, held := list(_flatten(map(_values, self.filled_dicts))))) != self.types
            or not all(map(is_, self.pick_children(held), self.children))
        ):
            return None
        # On a machine with nothing but a CPU, no tensor can move.
        if HAS_ACCELERATOR and list(map(_device, (*self.pick_parameters(held), *self.pick_buffers(held)))) != (
            self.device_list
        ):
            return None
        return held


class Surroundings:
    """What the functions of one forward pass share.

    Args:
        arguments: The tensors in the further arguments, which outlive the call.
        streams: The streams that the pass begins with.
    """

    __slots__ = (
        "argument_ids",
        "argument_versions",
        "arguments",
        "autocast",
        "autocast_types",
        "devices",
        "is_forward_mode",
        "is_mixed",
        "others",
        "random",
        "types",
    )

    def __init__(self, arguments: list[Tensor], streams: Sequence[Tensor]):
        self.arguments = arguments
        self.argument_ids = list(map(id, arguments))
        self.argument_versions = versions_of(arguments)
        self.devices: frozenset[torch.device] = ONLY_CPU
        self.types: tuple[str, ...] = ("cpu",)
        self.add_devices({tensor.device for tensor in (*arguments, *streams)})

    def add_devices(self, devices: Iterable[torch.device]) -> None:
        """Look after further devices, too."""
        if not (more := frozenset([device for device in devices if device.type != "meta"])) <= self.devices:
            self.devices = self.devices | more
        self.others = [device for device in self.devices if device.type != "cpu"]
        self.types = tuple(sorted({*self.types, *[device.type for device in devices]}))
        self.refresh()

    def refresh(self) -> None:
        """Look again at what code between two functions may have changed."""
        self.random: tuple[Tensor, tuple[Tensor, ...]] | None = None
        """The random states after the last function, which are the ones before the next; None if unknown."""
        self.autocast: tuple[AutocastState, ...] = autocast_states(self.types)
        self.autocast_types = tuple([state.device_type for state in self.autocast])
        self.is_mixed = any(state.enabled for state in self.autocast)
        self.is_forward_mode = forward_mode_level() >= 0

    def random_states(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the random states of the CPU and of the other devices."""
        return cpu_random_state(), self.other_states()

    def other_states(self) -> tuple[Tensor, ...]:
        """Return the random states of the devices besides the CPU."""
        return tuple([get_random_state(device) for device in self.others]) if self.others else ()


class RecordedCall:
    """One call of a function, able to be replayed.

    Args:
        name: The function's place in the model, for errors: "blocks.3.f".
        plan: What is known of the function; made again if it is None or stale.
        function: The function.
        surroundings: What the calls of one forward pass share.
    """

    __slots__ = (
        "autocast",
        "buffer_versions",
        "buffers",
        "constants",
        "held",
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
        "tail",
        "tail_error",
        "tail_found",
        "versions",
        "written",
    )

    def __init__(self, name: str, plan: Plan | None, function: nn.Module, surroundings: Surroundings):
        held = None if plan is None else plan.read()
        if plan is None or held is None:
            plan = Plan(**_inspect.describe(function, name))
            held = plan.read()
            assert held is not None
        self.name = name
        self.plan = plan
        self.surroundings = surroundings
        self.autocast = surroundings.autocast
        self.is_mixed = surroundings.is_mixed
        self.held = held
        self.parameters, self.buffers = plan.pick_parameters(held), plan.pick_buffers(held)
        # What lasts is known by the tensor itself, which is held here: no other tensor can take its identity (rule 4).
        self.lasting = {*map(id, self.parameters), *map(id, self.buffers), *surroundings.argument_ids}
        self.versions = list(map(_version, self.parameters))
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
        self.tail: Digest | None = None
        """A sample of the last saved tensor, where the result is not compared: a replay need not come to it."""
        self.tail_found: Digest | None = None
        """The same of the last replay."""
        self.tail_error = 0.0
        """How far it was off, relative to its size."""

    def record(
        self,
        filler: SlotFiller,
        index: int,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        sources: tuple[Tensor, ...] = (),
        *,
        may_stop_early: bool = False,
        keeps_tail: bool = False,
    ) -> Any:
        """Run the function for the first time, leaving slots of `filler`'s call number `index` in the graph.

        Args:
            filler: Fills the slots later.
            index: The number under which `filler` knows this call.
            function: What to call.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            sources: Inputs that are gone when the call is replayed, which then has others of the same values.
            may_stop_early: Whether a replay may end at the last saved tensor.
            keeps_tail: Whether to compare that tensor, because the result is not compared.
        """
        plan, surroundings = self.plan, self.surroundings
        num_calls = plan.num_calls
        num_calls[0] += 1
        checksums = None
        if plan.states or plan.fixed or plan.data_writes or num_calls[0] % CHECKSUM_INTERVAL == 1:
            checksums = _careful.before(self)
        if surroundings.arguments:
            _careful.forget_streams(self, sources)
        if plan.devices is not surroundings.devices and not plan.devices <= surroundings.devices:
            surroundings.add_devices(plan.devices)
        before, others_before = surroundings.random or surroundings.random_states()
        start = next_sequence_number()
        tensors: list[Tensor] = []
        versions: list[int] = []
        saved = Saved(filler, index, tensors, versions)
        nodes: list[int] | None = None
        lasting = self.lasting

        def pack(tensor: Tensor) -> tuple[Any, int]:
            # A miss is harmless: what is not known to last is rebuilt.
            if id(tensor) in lasting or ((base := tensor._base) is not None and id(base) in lasting):
                return tensor, tensor._version
            versions.append(tensor._version)
            tensors.append(tensor)
            return saved, len(tensors) - 1

        if may_stop_early or surroundings.is_forward_mode:
            nodes = []
            pack = _careful.make_pack(  # type: ignore[assignment]
                self, saved, tensors, versions, nodes
            )
        try:
            push_saved_tensors_hooks(pack, _unpack)
        except RuntimeError as error:
            raise _careful.no_hooks(error) from error
        try:
            result = function(*args, **kwargs)
        except BaseException:
            tensors.clear()  # The traceback refers to the hook, which would keep every activation.
            raise
        finally:
            pop_saved_tensors_hooks()
        after, others = surroundings.random = cpu_random_state(), surroundings.other_states()
        if compare_bytes(before.data_ptr(), after.data_ptr(), before.numel()) or others:
            self.random = _careful.moved(surroundings, (before, *others_before), (after, *others))
        if checksums is not None or self.states is not None or list(map(_version, self.parameters)) != self.versions:
            _careful.after(self, checksums)
        self.results = [meta_of(result)] if type(result) is Tensor else metas_of(result)
        if tensors:
            self._keep_slots(saved, tensors, versions, (result, *sources), start)
            if nodes is not None:
                self.stop_after = _careful.stop_after(tensors, nodes, sources)
                if keeps_tail and can_digest(tensors[-1]) and has_memory(tensors[-1]):
                    self.tail = digest_of(tensors[-1])
            # The nodes hold the hook, and the hook this list: a cycle through C++ that no collector sees (rule 1).
            tensors.clear()
        return result

    def _keep_slots(
        self, saved: Saved, tensors: list[Tensor], versions: list[int], own: tuple[Any, ...], start: int
    ) -> None:
        """Note what the slots stand for, and which of them a replay would not compute."""
        self.metas = list(map(meta_of, tensors))
        self.saved = weakref.ref(saved)
        if _may_come_from_elsewhere(tensors, own, start):
            self.constants = saved.constants = _careful.find_constants(self, tensors, versions, own, start)
        self.is_plain = not (any(versions) or any(map(_version, tensors)) or saved.was_read)
        if self.surroundings.is_forward_mode:
            self.is_plain = False
        saved.is_plain = self.is_plain and self.constants is None
        saved.tensors = saved.versions = None

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


def _may_come_from_elsewhere(tensors: list[Tensor], own: tuple[Any, ...], start: int) -> bool:
    """Return whether something else refers to one of the tensors, and the call made no node for it.

    What a function computes for itself is referred to by this list alone. (In a function of its own, so that none of
    its variables refers to a tensor when the references are counted again.)
    """
    known: Any = None
    for tensor, count, base in zip(tensors, list(map(getrefcount, tensors)), map(_base_of, tensors), strict=True):
        if (count <= FRESH_COUNT and base is None) or (origin := tensor if base is None else base) is known:
            continue
        known, node = origin, origin.grad_fn
        if (node is None or sequence_number_of(node) < start) and not _is_one_of(origin, own):
            return True
    return False


def _is_one_of(tensor: Tensor, own: tuple[Any, ...]) -> bool:
    return id(tensor) in map(id, own)


def metas_of(result: Any) -> list[Any]:
    """Return shape, dtype and device of the tensors that a function returned."""
    if isinstance(result, Tensor):
        return [meta_of(result)]
    return [meta_of(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


for _recording in (RecordedCall.record, _careful.make_pack, _careful.make_replay_pack, _careful.lasting_test):
    never_compile(_recording)
