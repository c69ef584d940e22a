"""The structure of a residual function: determined once, and checked cheaply at each call."""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from revnet._torch_internals import hooks_of
from revnet._torch_release import convert_in_replays, fsdp_modules_in, warn_if_untested
from revnet.engine._batch_norm import ReplayedNorm, is_torch_norm, keeps_statistics, replayed_norms_of
from revnet.engine._random import ONLY_CPU
from revnet.engine._self_contained import is_self_contained
from revnet.engine._tensors import flatten

_device = attrgetter("device")

ITEMS = tuple.__basicsize__
"""Distance from the identity of a tuple, which in CPython is its address, to its items, which are the identities of the
values. Comparing this memory takes a tenth of the time of a list of identities. The values themselves are not compared,
because `==` of tensors compares elements.
"""


@dataclass(slots=True)
class Plan:
    """The structure of a residual function in one mode.

    A plan refers to no parameters. Each call reads the tensors from the places that the plan knows. The parameters are
    new in every step under `torch.func.functional_call`, FSDP or weight norm, and the plan remains valid.
    """

    modules: list[nn.Module]
    flag_holders: list[Any]
    """Objects that hold the `training` flag of each module."""
    get_flag: Callable[[Any], bool]
    training: list[bool]
    empty: list[Any]
    """Dicts of parameters, buffers, children and, in a self-contained function, hooks that are empty."""
    values: list[Any]
    """Views of the values of the other dicts."""
    sizes: list[int]
    """Sizes of these dicts."""
    types: list[type]
    """Types of all values in these dicts, None included."""
    children: Sequence[nn.Module]
    pick_children: Callable[[Sequence[Any]], Sequence[nn.Module]]
    """Function that selects the children from a tuple of all values in the dicts."""
    pick_parameters: Callable[[Sequence[Any]], Sequence[Tensor]]
    """Function that selects the parameters from the same tuple."""
    pick_buffers: Callable[[Sequence[Any]], Sequence[Tensor]]
    """Function that selects the buffers from the same tuple."""
    parameter_places: list[tuple[Any, str]]
    buffer_places: list[tuple[Any, str]]
    device_list: list[torch.device]
    """Devices of the parameters and buffers, in order."""
    devices: frozenset[torch.device]
    statistics: list[int]
    """Places of the buffers that the function writes and does not read, as batch norm does in training."""
    fixed: list[int]
    """Places of the buffers that it reads and does not write, as batch norm does in evaluation."""
    states: list[int]
    """Places of all other buffers."""
    norms: list[ReplayedNorm]
    """Batch norms in training that can run without changing their statistics, which are not listed above."""
    sharded: list[Any]
    """Modules to which `fully_shard` was applied."""
    is_self_contained: bool
    """Whether the function computes from its input and from its own tensors alone; see `_self_contained`."""
    keeps_statistics: bool
    """Whether the statistics of these norms are kept for replays."""
    memory_of: Callable[[int], Any]
    """Function that returns the memory of the items of a tuple of all values, given its address; see `ITEMS`."""
    constants: set[int] = field(default_factory=set)
    """Places of the states on an accelerator that had the same values before and after the last call that compared
    them.
    """
    num_calls: int = 0
    """Number of calls so far."""
    data_writes: list[int] = field(default_factory=list)
    """Places of the parameters that the function was observed to write through `.data`."""
    metas: list[Any] = field(default_factory=list)
    """Shape, dtype and device of each tensor that a call saved. For a self-contained function, they are read again only
    if their number or the results change.
    """
    results: list[Any] = field(default_factory=list)
    """Shape, dtype and device of each tensor that the last call returned."""
    known: tuple[bytes, set[int]] = field(default_factory=lambda: (b"", set()))
    """Identities of all values in the dicts at the last call, and of the parameters and buffers among them.

    The plan holds the children. Another tensor may have taken the identity of a tensor that was freed; it is then at
    the same place, so the structure is the same.
    """
    with_class_forward: list[dict[str, Any]] = field(init=False)
    """Attributes of the modules that run the `forward` of their class: of norms, and of all in a self-contained
    function. If they contain `forward`, it was set after the plan was built.
    """

    def __post_init__(self) -> None:
        are_known = self.modules if self.is_self_contained else [norm.norm for norm in self.norms]
        self.with_class_forward = [module.__dict__ for module in are_known]

    def fit(self, held: tuple[Any, ...], ids: bytes) -> set[int] | None:
        """Return the identities of the parameters and buffers if they fit the structure; otherwise None.

        Args:
            held: All values in the dicts.
            ids: Their identities, which the plan stores.
        """
        if (
            list(map(len, self.values)) != self.sizes
            or list(map(type, held)) != self.types
            or not all(map(is_, self.pick_children(held), self.children))
        ):
            return None
        lasting = {*map(id, self.pick_parameters(held)), *map(id, self.pick_buffers(held))}
        self.known = ids, lasting  # In one assignment, because other threads read it.
        return lasting

    def has_devices_of(self, held: tuple[Any, ...]) -> bool:
        """Return whether the tensors are on the same devices as when the plan was built."""
        return list(map(_device, (*self.pick_parameters(held), *self.pick_buffers(held)))) == self.device_list


def plan_for(function: nn.Module, name: str) -> tuple[Plan, tuple[Any, ...], set[int]]:
    """Return the plan of a function in its current state, all values that its modules hold, and the ids of its tensors.

    Args:
        function: The function.
        name: Its place in the model, for error messages.

    Raises:
        NotImplementedError: The function contains a module of `torch.jit`, or a module that FSDP1 manages.
        ValueError: A parameter has no shape yet.
    """
    warn_if_untested()
    modules = list(function.modules())
    convert_in_replays(modules)
    kind_names = ("_parameters", "_buffers", "_modules")
    by_kind: list[list[Any]] = [[getattr(module, kind) for module in modules] for kind in kind_names]
    dicts = [*flatten(by_kind)]
    _refuse_jit(dicts, name)
    # Flags are read at each call, fastest from a dict, in C. But a module may define `training` as a property.
    has_flags = all("training" in module.__dict__ for module in modules)
    get_flag: Any = itemgetter("training") if has_flags else attrgetter("training")
    flag_holders: list[Any] = [module.__dict__ for module in modules] if has_flags else modules
    _refuse_lazy(modules)
    _refuse_fsdp1(modules, name)
    parameter_places, buffer_places = _places(by_kind[0]), _places(by_kind[1])
    devices = [_device(holder[name]) for holder, name in (*parameter_places, *buffer_places)]
    used = frozenset([device for device in devices if device.type != "meta"])  # The meta device has no random state.
    norms = replayed_norms_of(function)
    statistics, fixed, states = _kinds_of_buffers(modules, set(norms))
    values = [holder.values() for holder in dicts if len(holder)]
    held = tuple(flatten(values))
    hooks = flatten(map(hooks_of, modules)) if (is_known := is_self_contained(modules)) else ()
    kinds = [kind for kind, holders in enumerate(by_kind) for holder in holders for _ in holder]
    pick = [
        _picker([place for place, value in enumerate(held) if kinds[place] == kind and value is not None])
        for kind in range(3)
    ]
    plan = Plan(
        modules=modules,
        flag_holders=flag_holders,
        get_flag=get_flag,
        training=list(map(get_flag, flag_holders)),
        empty=[holder for holder in (*dicts, *hooks) if not len(holder)],
        values=values,
        sizes=list(map(len, values)),
        types=list(map(type, held)),
        children=pick[2](held),
        pick_children=pick[2],
        pick_parameters=pick[0],
        pick_buffers=pick[1],
        parameter_places=parameter_places,
        buffer_places=buffer_places,
        device_list=devices,
        devices=ONLY_CPU if used <= ONLY_CPU else used,  # The same object, which compares faster.
        statistics=statistics,
        fixed=fixed,
        states=states,
        norms=list(norms.values()),
        sharded=fsdp_modules_in(modules),
        is_self_contained=is_known,
        keeps_statistics=keeps_statistics(function, list(norms.values())),
        memory_of=(ctypes.c_char * (ctypes.sizeof(ctypes.c_void_p) * len(held))).from_address,
    )
    lasting = plan.fit(held, plan.memory_of(id(held) + ITEMS).raw)
    assert lasting is not None
    return plan, held, lasting


def _picker(places: list[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """Return a function, implemented in C because every call uses it, that picks the entries of a tuple at `places`."""
    if len(places) > 1:
        return itemgetter(*places)
    # For a single place, `itemgetter` would return the entry itself; a slice returns a tuple.
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def _kinds_of_buffers(modules: list[nn.Module], plain_norms: set[int]) -> tuple[list[int], list[int], list[int]]:
    """Return the places of buffers that a function only writes, of buffers that it only reads, and of all others."""
    statistics: list[int] = []
    fixed: list[int] = []
    states: list[int] = []
    place = 0
    for module in modules:
        is_norm = is_torch_norm(module)
        for buffer in module._buffers.values():
            if buffer is None:
                continue
            if not is_norm:
                states.append(place)
            elif not module.training:
                fixed.append(place)
            # A replay runs plain norms without statistics, so their buffers need no copy.
            elif id(module) not in plain_norms:
                statistics.append(place)
            place += 1
    return statistics, fixed, states


def _places(holders: list[Any]) -> list[tuple[Any, str]]:
    return [(holder, name) for holder in holders for name, tensor in holder.items() if tensor is not None]


def _refuse_jit(dicts: list[Any], name: str) -> None:
    if any(not isinstance(holder, dict) for holder in dicts):
        raise NotImplementedError(
            f"`{name}` contains a module of `torch.jit`, whose executor saves different tensors from run to run, so "
            "its activations cannot be rebuilt; use the module that it was scripted from, or store its block's "
            "activations with the policy `Store()`."
        )


def _refuse_lazy(modules: list[nn.Module]) -> None:
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and is_lazy(parameter):
                raise ValueError(
                    f"`{name}` of {type(module).__name__} has no shape yet; call the residual function once, under "
                    "`torch.no_grad()`, before it runs reversibly."
                )


def _refuse_fsdp1(modules: list[nn.Module], name: str) -> None:
    for module in modules:
        # By name, so that users without FSDP need not import it.
        is_wrapper = type(module).__name__ == "FullyShardedDataParallel"
        # FSDP marks the modules below a wrapper; the second version leaves parameters in their places.
        is_managed = getattr(module, "_is_fsdp_managed_module", False)
        has_parameters = all(value is None or isinstance(value, nn.Parameter) for value in module._parameters.values())
        if is_wrapper or (is_managed and not (getattr(module, "_fsdp_use_orig_params", False) and has_parameters)):
            raise NotImplementedError(
                f"`{name}` is sharded by `FullyShardedDataParallel`, which removes parameters from their modules, so "
                "it cannot run again in the backward pass; shard functions, blocks, the sequence or the root with "
                "`torch.distributed.fsdp.fully_shard` instead."
            )
