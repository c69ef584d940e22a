"""One call of a function that keeps none of its activations, and the information needed to run it again.

`RecordedCall.record` runs the function under saved-tensor hooks that leave a *slot* in the autograd graph for each
tensor that autograd wants to save. `replay` (in `_replay`) runs it again under hooks that collect the same tensors, and
fills the slots. Code that only some functions need is in `_careful`, `_states` and `_restore`.
"""

import weakref
from collections.abc import Callable
from operator import attrgetter, methodcaller
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor, nn

from revnet._torch_internals import (
    HAS_ACCELERATOR,
    any_autocast_is_on,
    never_compile,
    next_sequence_number,
    num_dispatch_modes,
    num_function_modes,
    pop_saved_tensors_hooks,
    push_saved_tensors_hooks,
    sequence_number_of,
)
from revnet.engine import _careful, _states
from revnet.engine._batch_norm import WORTHWHILE, KeptStatistics
from revnet.engine._careful import FRESH_BASE_COUNT, FRESH_COUNT, meta_of
from revnet.engine._digest import Tail
from revnet.engine._keeper import AbstractKeeper
from revnet.engine._plan import ITEMS, Plan, plan_for
from revnet.engine._random import cpu_random_state, memory_of
from revnet.engine._saved_samples import CHECKSUM_INTERVAL
from revnet.engine._slot_filler import SlotFiller
from revnet.engine._surroundings import Surroundings
from revnet.engine._tensors import flatten, get_requires_grad, get_version, storage_key

_node_of = attrgetter("grad_fn")
_has_own_forward = methodcaller("__contains__", "forward")
_nothing: Callable[[], None] = type(None)  # Makes no Python call.


class Saved:
    """The object that all slots of one call refer to: it has the filler, and the tensors while they are filled.

    A slot is a number, and the hook that unpacks it is bound to its `Saved`; a step would otherwise create thousands of
    objects. `lasting` holds the identities of the tensors that outlive the call.
    """

    __slots__ = (
        *("__weakref__", "bases", "constants", "filler", "index", "is_plain", "kept", "lasting", "nodes"),
        *("others", "tensors", "versions", "was_read"),
    )

    def __init__(self, filler: SlotFiller, index: int, lasting: set[int]):
        self.filler, self.index, self.lasting = filler, index, lasting
        self.tensors: list[Any] | None = []
        self.versions: list[int] | None = []
        self.bases: list[Tensor] = []
        """Tensors that the saved ones are views of, until the function returns."""
        self.nodes: list[int] = []
        """Number of the operation that saved each tensor, if it is recorded."""
        self.others: list[tuple[Tensor, int]] = []
        """Tensors that outlive the call, and views of them, with their versions; their slots count down from -1."""
        self.constants: dict[int, tuple[Tensor, int]] | None = None
        """Tensors from outside the function, which are kept and never rebuilt, by the number of their slot."""
        self.is_plain = False
        """Whether no tensor had been written to when it was saved, so that reading a slot takes only a lookup."""
        self.kept: list[tuple[Tensor, int, bool]] | None = None
        """The function's inputs, with version and `requires_grad`, if they are kept instead of rebuilt."""
        self.was_read = False
        """Whether a slot was read before the forward pass ended, by a function that differentiates inside itself."""

    def pack(self, tensor: Tensor) -> int:
        """Return the slot of a tensor that autograd saves in a first run."""
        lasting = self.lasting  # A miss is harmless: a tensor not known to last is rebuilt.
        if id(tensor) in lasting or ((base := tensor._base) is not None and id(base) in lasting):
            (others := self.others).append((tensor, tensor._version))
            return -len(others)
        if base is not None:
            self.bases.append(base)
        self.versions.append(tensor._version)  # type: ignore[union-attr]
        (tensors := self.tensors).append(tensor)  # type: ignore[union-attr]
        return len(tensors) - 1  # type: ignore[arg-type]

    def pack_and_note(self, tensor: Tensor) -> int:
        """Return the slot of a tensor, and record which operation saves it."""
        number = self.pack(tensor)
        if number >= 0:
            self.nodes.append(next_sequence_number())
        return number

    def unpack(self, number: int) -> Any:
        """Return the tensor of a slot, or a tensor that outlives the call, with autograd's check of the version."""
        if number < 0:
            tensor, version = self.others[~number]
            if tensor._version != version:
                raise _careful.modified("a parameter, buffer or argument of a residual function", tensor, version)
            self.was_read = True  # Before the forward pass ends, the function differentiates inside.
            return tensor
        if self.is_plain:
            if (tensors := self.tensors) is None:
                if torch.compiler.is_dynamo_compiling():
                    _careful.refuse_compiled_autograd()
                with self.filler.lock:  # Each device has its own backward thread.
                    if self.tensors is None:  # Another thread may have filled it first.
                        self.filler.rebuild(self.index)
                tensors = self.tensors
            if tensors is not None and (tensor := tensors[number]) is not None and not tensor._version:
                tensors[number] = None  # Given away (rule 2); one interpreter operation, so it needs no lock.
                return tensor
        return _careful.take(self, number)


class RecordedCall:
    """One call of a function, which can be replayed.

    Its `plan` describes the structure of the function, and is replaced if it is None or out of date. Its `name` is the
    function's place in the model, for error messages: "blocks.3.f".
    """

    __slots__ = (
        *("autocast", "before", "buffer_versions", "buffers", "constants", "held", "ids", "is_mixed", "is_plain"),
        *("is_self_contained", "keepers", "lasting", "metas", "name", "others", "parameters", "plan", "random"),
        *("requires_grad", "results", "saved", "states", "stop_after", "surroundings", "tail", "versions", "written"),
    )

    def __init__(self, name: str, plan: Plan | None, function: nn.Module, surroundings: Surroundings):
        held: tuple[Any, ...] = () if plan is None else tuple(flatten(plan.values))
        ids, lasting = b"", None
        if plan is not None and len(held) == len(plan.types):
            ids, (known, lasting) = plan.memory_of(id(held) + ITEMS).raw, plan.known
            if ids != known:  # New tensors, for example from FSDP; the structure may be the same.
                lasting = plan.fit(held, ids)
        if (
            plan is None
            or lasting is None
            or [*map(plan.get_flag, plan.flag_holders)] != plan.training
            or any(plan.empty)  # Filled since then, and missing in `held`.
            or any(map(_has_own_forward, plan.with_class_forward))
            or (HAS_ACCELERATOR and not plan.has_devices_of(held))  # Without an accelerator, no tensor can move.
        ):
            plan, held, lasting = plan_for(function, name)
            ids = plan.known[0]
        self.name, self.plan, self.surroundings = name, plan, surroundings
        if any_autocast_is_on() != surroundings.is_mixed:
            surroundings.refresh()  # A hook of a function has switched it.
        self.autocast, self.is_mixed = surroundings.autocast, surroundings.is_mixed
        # Lasting tensors are identified by objects that are held here, so that no other can take the identity (rule 4).
        self.held, self.ids, self.lasting = held, ids, lasting
        self.parameters, self.buffers = plan.pick_parameters(held), plan.pick_buffers(held)
        if surroundings.given is not None:
            surroundings.given.note(lasting)
        self.versions = [*map(get_version, self.parameters)]
        self.requires_grad = [*map(get_requires_grad, self.parameters)]
        self.random: list[tuple[torch.device, Tensor, int | None]] | None = None
        """For each device on which the function draws: the random state before, and a digest of the state after."""
        self.states: dict[int, Tensor] | None = None
        """Copies of the buffers that the function changes, from before the call, by their place."""
        self.written: dict[int, Tensor] | None = None
        """Initial values, in a replay, of the parameters that the function writes to, by their place."""
        self.buffer_versions: dict[int, int] | None = None
        """Versions of the buffers that must not change, by their place."""
        self.constants: dict[int, tuple[Tensor, int]] | None = None
        self.saved: Callable[[], Saved | None] = _nothing
        """Weak reference to the object of the slots. It returns None if no backward pass can ask for any of them."""
        self.metas: list[Any] = []
        self.results: list[Any] = []
        """Shape, dtype and device of each returned tensor; `metas` describes each saved tensor."""
        self.is_plain = True
        """Whether no saved tensor was written to, and none was read before the forward pass ended."""
        self.is_self_contained = False
        """Whether the function computed from its input and from its own tensors alone; see `_self_contained`."""
        self.keepers: tuple[AbstractKeeper, ...] = ()
        """Keep parts of the first run for its replay."""
        self.stop_after = -1
        """Number of saved tensors after which a replay may stop; -1 if it must run to the end."""
        self.tail: Tail | None = None
        """Sample of a saved tensor, if the result is not compared because a replay may stop before it."""

    def record(
        self,
        filler: SlotFiller,
        index: int,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        sources: tuple[Tensor, ...] = (),
        *,
        may_stop_early: bool = False,
        keeps_tail: bool = False,
    ) -> Any:
        """Call `function` for the first time, and leave slots of `filler`'s call number `index` in the graph.

        Args:
            filler: Fills the slots later.
            index: The number under which `filler` knows this call.
            function: The callable: the function, or the function together with the coupling.
            args: Its arguments.
            sources: Inputs that no longer exist when the call is replayed; a replay has others with the same values.
            may_stop_early: Whether a replay may end at the last saved tensor.
            keeps_tail: Whether to compare that tensor, because the result is not compared.
        """
        plan, surroundings = self.plan, self.surroundings
        plan.num_calls += 1
        checksums = None
        if plan.states or plan.fixed or plan.data_writes or plan.num_calls % CHECKSUM_INTERVAL == 1:
            checksums = _states.before(self)
        if plan.devices is not surroundings.devices and not plan.devices <= surroundings.devices:
            surroundings.add_devices(plan.devices)
        self.before, self.others = surroundings.random or surroundings.random_states(), surroundings.others
        start = next_sequence_number()  # Nodes with lower numbers existed before the call.
        saved = Saved(filler, index, self.lasting)
        tensors: list[Tensor] = saved.tensors  # type: ignore[assignment]
        is_known = plan.is_self_contained and not may_stop_early and function is plan.modules[0]
        is_known = is_known and type(args[0]) is Tensor and not (num_function_modes() or num_dispatch_modes())
        self.is_self_contained = is_known  # A mode may replace any operation.
        pack: Callable[[Tensor], int] = saved.pack_and_note if may_stop_early else saved.pack
        if surroundings.is_forward_mode:
            pack = _careful.make_pack(self, saved)
        if plan.keeps_statistics and sources and sources[0].numel() >= WORTHWHILE:
            self.keepers += (KeptStatistics(plan.norms),)
        for keeper in self.keepers:
            function = keeper.recording(function, saved)
        try:
            push_saved_tensors_hooks(pack, saved.unpack)
        except RuntimeError as error:
            raise _careful.no_hooks(error) from error
        try:
            result = function(*args)
        except BaseException as error:
            _careful.failed(error, saved)
            raise
        finally:
            pop_saved_tensors_hooks()
        surroundings.random = self.before
        if not is_known:
            memory = memory_of((after := cpu_random_state()).data_ptr())
            if self.before[1] != memory or surroundings.others:
                surroundings.random = after, bytearray(memory), surroundings.other_states()
                self.random = _careful.moved(surroundings, self.before, surroundings.random)
        is_written = not is_known and [*map(get_version, self.parameters)] != self.versions
        if checksums is not None or self.states is not None or is_written:
            _states.after(self, checksums)
        self.results = results = [meta_of(result)] if type(result) is Tensor else _careful.metas_of(result)
        if results != plan.results:
            plan.results, plan.metas = results, []
        if tensors:
            self._keep_slots(saved, tensors, (own := (result, *sources)), start)
            if may_stop_early:
                for keeper in self.keepers:
                    keeper.drop(result)
                self._find_stop(tensors, saved.nodes, sources)
                self.tail = Tail.of(self, tensors, saved.nodes, own) if keeps_tail else None
            # The nodes hold the hook, and the hook this list: a cycle that no garbage collector sees (rule 1).
            tensors.clear()
        return result

    def _keep_slots(self, saved: Saved, tensors: list[Tensor], own: tuple[Any, ...], start: int) -> None:
        """Record what the slots refer to, and which of them a replay would not compute."""
        metas = self.plan.metas  # The same list as before, if possible: the garbage collector has nothing new to track.
        if not (self.is_self_contained and len(tensors) == len(metas)):
            metas = metas if metas == (new := [*map(meta_of, tensors)]) else new
        self.metas = self.plan.metas = metas
        self.saved = weakref.ref(saved)  # The graph owns it (rule 1).
        may_have_constants = not self.is_self_contained and _may_come_from_elsewhere(tensors, saved.bases, own, start)
        saved.bases.clear()  # The hook, too, refers to this list, and `find_constants` counts references once more.
        if may_have_constants:
            self.constants = saved.constants = _careful.find_constants(self, tensors, saved.versions or [], own, start)
        # Versions never decrease, so they show a write at any time.
        self.is_plain = not (any(map(get_version, tensors)) or saved.was_read or self.surroundings.is_forward_mode)
        saved.is_plain = self.is_plain and self.constants is None
        saved.tensors = saved.versions = None

    def _find_stop(self, tensors: list[Tensor], nodes: list[int], sources: tuple[Tensor, ...]) -> None:
        """Set the number of saved tensors after which a replay may stop.

        An operation saves its inputs before it computes, so the last operation need not compute at all. But some save
        memory that they are about to fill (such as RReLU's noise), and these must run.
        """
        for tensor, node in zip(reversed(tensors), reversed(nodes), strict=True):
            if node != nodes[-1]:
                break
            if tensor.grad_fn is None and storage_key(tensor) not in map(storage_key, sources):
                return
        self.stop_after = len(tensors)


def _may_come_from_elsewhere(tensors: list[Tensor], bases: list[Tensor], own: tuple[Any, ...], start: int) -> bool:
    """Return whether a tensor existed before the call: others refer to it, and the call created no node for it."""
    seen, base_ids = [*map(id, own)], [*map(id, bases)]  # A replay has its own result and inputs.
    held: list[Tensor] = []  # Something else may refer to them.
    for tensor, count, after in zip(tensors, [*map(getrefcount, tensors)], [*tensors[1:], None], strict=True):
        if count > FRESH_COUNT and id(tensor) not in seen:
            seen.append(id(tensor))
            # An operation may save its output, and the next one the same tensor: then the list refers to it twice.
            if tensor is not after or count > FRESH_COUNT + 1:
                held.append(tensor)
    for base, count in zip(bases, [*map(getrefcount, bases)], strict=True):
        if count >= FRESH_BASE_COUNT + base_ids.count(id(base)) and id(base) not in seen:
            seen.append(id(base))
            held.append(base)
    nodes = [*map(_node_of, held)]
    return None in nodes or min(map(sequence_number_of, nodes), default=start) < start


for _hook in (Saved.pack, Saved.pack_and_note, Saved.unpack):
    never_compile(_hook)
