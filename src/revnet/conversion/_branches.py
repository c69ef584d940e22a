"""The residual branches of a block, by the names of their modules."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from revnet._checks import describe
from revnet.conversion._bodies import Branch, WholeBlock
from revnet.conversion._row import Place
from revnet.engine._open_run import Given
from revnet.engine._tensors import has_values
from revnet.nn._exchanged_class import is_cache

Branches: TypeAlias = Sequence[Sequence[str] | str]
_SLACK = 1e-2
"""Largest difference of the branches from the block, relative to what the block adds to its input."""


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
    """Raise if the branches do not compute what the block computes, on its first input.

    Raises:
        ValueError: They differ.
    """
    if not has_values(x):
        return
    args, kwargs = arguments
    assert place.branches is not None
    devices = [x.device] if x.device.type != "cpu" else []
    # Copies, so that neither statistics nor random states change; in float32, where small residuals are visible.
    whole, functions = _copied(place)
    modules = [whole, *functions]
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
        args, kwargs = torch.utils._pytree.tree_map(_widened, (args, kwargs))
        modules = [module.float() for module in modules]
    x = x.detach()
    outcomes = []
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for run in (partial(modules[0], x), partial(_composed, modules[1:], x)):
            with torch.random.fork_rng(devices, device_type=devices[0].type if devices else "cuda"):
                own_args, own_kwargs = torch.utils._pytree.tree_map(_own_cache, (args, kwargs), is_leaf=is_cache)
                outcomes.append(run(*own_args, **own_kwargs))
    whole_y, composed = outcomes
    error, size = float((whole_y - composed).norm()), float((whole_y - x).norm())
    if not error <= _SLACK * size:
        raise ValueError(
            f"`branches` do not compute what `{place.name}` (={type(place.block).__name__}) computes: what they add to "
            f"its input differs by {error / (size or 1.0):.1g} of its norm; name all modules of each "
            "branch in their order, or leave `branches` out."
        )
    place.whole.kind_of_output, place.whole.rest = whole.kind_of_output, whole.rest
    place.is_checked = True


def _copied(place: Place) -> tuple[WholeBlock, tuple[nn.Module, ...]]:
    """Return copies of the block and its branches without hooks, which must run only once per pass."""
    assert place.branches is not None
    # A tensor with a graph cannot be copied. The old `weight_norm` leaves one in its module.
    tensors = [value for module in place.whole.modules() for value in vars(module).values()]
    memo: dict[int, Any] = {
        id(tensor): tensor.detach() for tensor in tensors if isinstance(tensor, Tensor) and not tensor.is_leaf
    }
    whole, branches = copy.deepcopy((place.whole, place.branches), memo)
    for module in whole.modules():
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    return whole, branches


def _own_cache(value: Any) -> Any:
    """Return a copy of a cache, which each run changes, and other values as they are."""
    return copy.deepcopy(value) if is_cache(value) else value


def _composed(functions: Sequence[Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    for function in functions:
        x = x + function(x, *args, **kwargs)
    return x


def _widened(value: Any) -> Any:
    is_low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_low else value
