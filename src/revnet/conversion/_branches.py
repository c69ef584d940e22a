"""The residual branches of a block, by the names of their modules."""

import copy
import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from revnet._checks import describe
from revnet.conversion._bodies import WholeBlock
from revnet.conversion._row import Place
from revnet.engine._open_run import Arguments
from revnet.engine._tensors import has_values
from revnet.nn._exchanged_class import is_cache

Branches: TypeAlias = Sequence[Sequence[str] | str]
_SLACK = 1e-2
"""Largest difference of the branches from the block, relative to what the block adds to its input."""


class Branch(nn.Module):
    """Modules of a block that run one after the other, as a residual function.

    Args:
        block: The block.
        name: Name of the block.
        path: Names of the modules.
    """

    def __init__(self, block: nn.Module, name: str, path: Sequence[str]):
        super().__init__()
        self.name = name
        self._kind = type(block)
        self._paths = [tuple(step.split(".")) for step in path]
        self.steps = nn.ModuleList([block.get_submodule(step) for step in path])

    def _get_name(self) -> str:
        """Return the name of the block for error messages."""
        return self.name

    def is_current(self, block: nn.Module) -> bool:
        """Return whether the modules are still the ones that `block` has by these names."""
        for path, step in zip(self._paths, self.steps, strict=True):
            module: nn.Module | None = block
            for name in path:
                module = None if module is None else module._modules.get(name)
            if module is not step:
                return False
        return True

    def renewed(self, block: nn.Module) -> "Branch":
        """Return the branch with the modules that `block` has now.

        Raises:
            ValueError: The block has no module of a name.
        """
        (branch,) = make_branches(block, self.name, [[".".join(path) for path in self._paths]])
        branch._kind = self._kind
        return branch

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the modules. Each gets the arguments of the block whose names it knows."""
        given = _named(self._kind, x, args, kwargs) if args or kwargs else {}
        for step in self.steps:
            output = step(x, **_known(type(step), given)) if given else step(x)
            x = output[0] if isinstance(output, tuple | list) else output
        return x


def _named(kind: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a block by name, without the stream."""
    bound = _signature(kind).bind(None, x, *args, **kwargs)
    named: dict[str, Any] = {}
    for number, (name, value) in enumerate(bound.arguments.items()):
        way = bound.signature.parameters[name].kind
        if way is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif number > 1 and way is not inspect.Parameter.VAR_POSITIONAL:
            named[name] = value
    return named


def _known(kind: Any, given: dict[str, Any]) -> dict[str, Any]:
    parameters = _signature(kind).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return given
    names = list(parameters)[2:]
    return {name: value for name, value in given.items() if name in names}


def _signature_of(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)


# Type checkers do not accept a class of modules as a key.
_signature: Callable[[Any], inspect.Signature] = functools.lru_cache(maxsize=256)(_signature_of)


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
        for step in steps:
            try:
                block.get_submodule(step)
            except AttributeError:
                names = ", ".join(child for child, _ in block.named_children())
                raise ValueError(
                    f"`branches` names {step!r}, which `{name}` (={type(block).__name__}) does not have; it "
                    f"has {names}."
                ) from None
        made.append(Branch(block, name, steps))
    return tuple(made)


def check_branches(place: Place, x: Tensor, arguments: Arguments) -> None:
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
                own_args, own_kwargs = _with_own_caches(args, kwargs)
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
    """Return copies of the block and of its branches, without hooks: those of a user run once in a pass."""
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


def _with_own_caches(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments, with a copy of a cache, which each run changes."""
    return tuple([copy.deepcopy(value) if is_cache(value) else value for value in args]), {
        name: copy.deepcopy(value) if is_cache(value) else value for name, value in kwargs.items()
    }


def _composed(functions: Sequence[Any], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    for function in functions:
        x = x + function(x, *args, **kwargs)
    return x


def _widened(value: Any) -> Any:
    is_low = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_low else value
