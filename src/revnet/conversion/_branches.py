"""The residual branches of a block, by the names of their modules."""

import math
from collections.abc import Sequence
from functools import partial
from inspect import Parameter
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from revnet._checks import describe, describe_kind
from revnet._torch_internals import outside_of_traces, without_parametrization_cache
from revnet.conversion._bodies import Branch, signature_of
from revnet.conversion._row import Place
from revnet.conversion._trial import Substitutes, on_trial, trial_lock
from revnet.engine._open_run import Given
from revnet.engine._tensors import has_values
from revnet.nn._exchanged_class import is_cache
from revnet.nn._restore import restoring_host_random_states

Branches: TypeAlias = Sequence[Sequence[str] | str]
_SLACK = 1e-2
"""Largest difference of the branches from the block, relative to what the block adds to its input."""
_PLAIN = (bool, int, float, str)
"""Types of arguments that can be compared with a default."""


def check_kind_of_branches(branches: Any) -> None:
    """Raise unless `branches` is a sequence of two or three entries.

    Raises:
        TypeError: It is not.
    """
    if isinstance(branches, str) or not isinstance(branches, Sequence) or not 2 <= len(branches) <= 3:
        raise TypeError(
            f"`branches` (={describe(branches)}) must be two or three lists of names, such as "
            "[['norm1', 'attn'], ['norm2', 'mlp']]."
        )


def make_branches(block: nn.Module, name: str, branches: Branches) -> tuple[Branch, ...]:
    """Return the branches of a block.

    Raises:
        TypeError: An entry of `branches` does not hold names.
        ValueError: The block has no module of a name.
    """
    made = []
    for path in branches:
        steps = path.split() if isinstance(path, str) else path
        if not isinstance(steps, Sequence) or not steps or not all(isinstance(step, str) for step in steps):
            raise TypeError(f"`branches` holds {describe(path)}, which must be names of modules of a block.")
        made.append(Branch(block, type(block), name, steps))
    return tuple(made)


def check_branches(place: Place, x: Tensor, arguments: Given) -> None:
    """Raise if the branches do not compute what the block computes, on its first input of each kind.

    Kinds differ in which modules are in training mode and in which arguments are given. Dropout that the branches leave
    out, for example, shows only in training mode, and a mask only in calls that pass one.

    Raises:
        ValueError: They differ, or an argument reaches no branch.
    """
    args, kwargs = arguments
    _check_untaken(place, args, kwargs)
    modes = [module.training for module in place.outside]
    kind = (*modes, *map(_sort_of, args), *[(name, _sort_of(value)) for name, value in kwargs.items()])
    if kind not in place.checked and has_values(x):
        with trial_lock:
            # Another thread may have run the same trial, and now runs the block.
            if kind not in place.checked and _compare(place, x, arguments):
                place.checked[kind] = place.whole.wrapping
    if (wrapping := place.checked.get(kind)) is not None and wrapping != place.whole.wrapping:
        place.whole.wrapping = wrapping


def _sort_of(value: Any) -> Any:
    """Return a switch as it is, and one symbol for all other values."""
    return value if value is None or isinstance(value, bool) else ...


def _check_untaken(place: Place, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise if an argument may have an effect in the block, and has none in the branches."""
    for name, position in place.untaken.items():
        default = signature_of(type(place.block)).parameters[name].default
        value = args[position] if position < len(args) else kwargs.get(name, default)
        if _is_default(value, default):
            continue
        raise ValueError(
            f"`branches` leave out the argument `{name}` (={describe_kind(value)}) of `{place.name}` "
            f"(={type(place.block).__name__}), which none of their modules takes by this name; leave `branches` out, "
            "or rename the argument in the block or in its module."
        )


def _is_default(value: Any, default: Any) -> bool:
    if value is default:
        return True
    if value is None or value is False:
        return default is Parameter.empty or not default
    return isinstance(value, _PLAIN) and type(value) is type(default) and bool(value == default)


def _compare(place: Place, x: Tensor, arguments: Given) -> bool:
    """Compare the branches with the block, and return whether this input can tell them apart from others.

    Raises:
        ValueError: They differ.
    """
    assert place.branches is not None
    modules = [*place.block.modules(), *chain.from_iterable(branch.modules() for branch in place.branches)]
    devices = [x.device] if x.device.type != "cpu" else []
    # In float32, where small residuals are visible; outside of modes that count operations and memory.
    is_wide = x.dtype in (torch.bfloat16, torch.float16)
    outcomes = []
    no_cast = torch.autocast(x.device.type, enabled=False)
    with torch.no_grad(), no_cast, outside_of_traces(), without_parametrization_cache():
        for run in (place.whole, partial(_composed, place.branches)):
            # Both runs have the same random numbers and the same substitutes.
            forked = torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda")
            with forked, restoring_host_random_states(), on_trial(modules, is_wide=is_wide):
                own = Substitutes(is_wide=is_wide).of
                own_x, own_args, own_kwargs = tree_map(own, (x, *arguments), is_leaf=is_cache)
                outcomes.append(run(own_x, *own_args, **own_kwargs))
        whole_y, composed = outcomes
        error, size = float((whole_y - composed).norm()), float((whole_y - x).norm())
    if not math.isfinite(size):
        return False
    if not error <= _SLACK * size:
        raise ValueError(
            f"`branches` do not compute what `{place.name}` (={type(place.block).__name__}) computes: what they add to "
            f"its input differs by {error / (size or 1.0):.1g} of its norm; name all modules of each "
            "branch in their order, or leave `branches` out."
        )
    return size > 0


def _composed(branches: Sequence[Branch], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    for branch in branches:
        residual = branch(x, *args, **kwargs)
        if residual.shape != x.shape:
            raise ValueError(
                f"`branches` name {list(branch.path)}, which change the shape of the stream of `{branch.name}` from "
                f"{tuple(x.shape)} to {tuple(residual.shape)}; name all modules of each branch in their order, or "
                "leave `branches` out."
            )
        x = x + residual
    return x
