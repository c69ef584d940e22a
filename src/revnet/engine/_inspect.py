"""Finding out what the engine needs to know of a residual function; see `Plan` in `_record`."""

from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from revnet.engine._batch_norm import is_torch_norm, replayed_norms_of

_device = attrgetter("device")


def describe(function: nn.Module, name: str) -> dict[str, Any]:
    """Return the fields of the function's `Plan`.

    Args:
        function: The function.
        name: Its place in the model, for errors.

    Raises:
        NotImplementedError: It holds a module of `torch.jit`, or one that the first version of FSDP manages.
        ValueError: A parameter has no shape yet.
    """
    modules = list(function.modules())
    parameter_dicts = [module._parameters for module in modules]
    buffer_dicts = [module._buffers for module in modules]
    child_dicts = [module._modules for module in modules]
    dicts: list[Any] = [*parameter_dicts, *buffer_dicts, *child_dicts]
    if any(not isinstance(holder, dict) for holder in dicts):
        raise NotImplementedError(
            f"`{name}` holds a module of `torch.jit`, whose executor saves other tensors from run to run, so that what "
            "it computes cannot be rebuilt; use the module that it was scripted from, or keep its block's activations "
            "with the policy `Store()`."
        )
    has_flags = all("training" in module.__dict__ for module in modules)
    get_flag: Any = itemgetter("training") if has_flags else attrgetter("training")
    flag_holders: list[Any] = [module.__dict__ for module in modules] if has_flags else modules
    training = list(map(get_flag, flag_holders))
    _refuse_lazy(modules)
    _refuse_fsdp1(modules, name)
    parameter_places, buffer_places = _places(parameter_dicts), _places(buffer_dicts)
    devices = [_device(holder[name]) for holder, name in (*parameter_places, *buffer_places)]
    norms = replayed_norms_of(function)
    statistics, fixed, states = _kinds_of_buffers(modules, training, set(norms))
    filled = [holder for holder in dicts if len(holder)]
    held = list(chain.from_iterable(map(dict.values, filled)))
    by_kind: list[list[Any]] = [list(parameter_dicts), list(buffer_dicts), list(child_dicts)]
    kinds = [kind for kind, holders in enumerate(by_kind) for _ in _held(holders)]
    pick = [
        _picker([place for place, each in enumerate(held) if kinds[place] == kind and each is not None])
        for kind in range(3)
    ]
    return {
        "modules": modules,
        "dicts": dicts,
        "sizes": list(map(len, dicts)),
        "filled_dicts": filled,
        "types": list(map(type, held)),
        "children": pick[2](held),
        "pick_parameters": pick[0],
        "pick_buffers": pick[1],
        "pick_children": pick[2],
        "flag_holders": flag_holders,
        "get_flag": get_flag,
        "training": training,
        "parameter_places": parameter_places,
        "buffer_places": buffer_places,
        "device_list": devices,
        "devices": frozenset([each for each in devices if each.type != "meta"]),
        "statistics": statistics,
        "fixed": fixed,
        "states": states,
        "norms": list(norms.values()),
        "num_calls": [0],
        "data_writes": [],
    }


def _held(holders: list[Any]) -> list[Any]:
    return list(chain.from_iterable(map(dict.values, holders)))


def _picker(places: list[int]) -> Callable[[list[Any]], Sequence[Any]]:
    """Return the function that returns the entries of a list at these places; one in C, since it runs at each call."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1) if places else slice(0))


def _kinds_of_buffers(
    modules: list[nn.Module], training: list[bool], plain_norms: set[int]
) -> tuple[list[int], list[int], list[int]]:
    """Return the places of the buffers that a function only writes, of those that it only reads, and of all others."""
    statistics: list[int] = []
    fixed: list[int] = []
    states: list[int] = []
    place = 0
    for module, is_training in zip(modules, training, strict=True):
        is_norm = is_torch_norm(module)
        for buffer in module._buffers.values():
            if buffer is None:
                continue
            if not is_norm:
                states.append(place)
            elif not is_training:
                fixed.append(place)
            elif id(module) not in plain_norms:
                statistics.append(place)
            place += 1
    return statistics, fixed, states


def _places(holders: list[Any]) -> list[tuple[Any, str]]:
    return [(holder, name) for holder in holders for name, tensor in holder.items() if tensor is not None]


def _refuse_lazy(modules: list[nn.Module]) -> None:
    for module in modules:
        for name, parameter in module._parameters.items():
            if parameter is not None and is_lazy(parameter):
                raise ValueError(
                    f"`{name}` of {type(module).__name__} has no shape yet; call the residual function once, under "
                    "`torch.no_grad`, before it runs reversibly."
                )


def _refuse_fsdp1(modules: list[nn.Module], name: str) -> None:
    for module in modules:
        is_wrapper = type(module).__name__ == "FullyShardedDataParallel"
        # FSDP puts its marks on the modules below a wrapper; the second version leaves parameters in their places.
        is_managed = getattr(module, "_is_fsdp_managed_module", False)
        has_parameters = all(each is None or isinstance(each, nn.Parameter) for each in module._parameters.values())
        if is_wrapper or (is_managed and not (getattr(module, "_fsdp_use_orig_params", False) and has_parameters)):
            raise NotImplementedError(
                f"`{name}` is sharded by `FullyShardedDataParallel`, which takes parameters out of their modules, so "
                "that it cannot run again in the backward pass; shard functions, blocks, the sequence or the root with "
                "`torch.distributed.fsdp.fully_shard` instead."
            )
