"""The functions of a converted block: the original block as a whole, or its branches, without its hooks."""

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Wrapping = tuple[type | None, tuple[Any, ...]]
"""The class of a tuple or list that a block returns around its tensor, if any, and what follows it: only None."""
_WRAPPED = ("base_layer", "module")
"""Names of the module inside a wrapper that takes any argument, as in PEFT and in `DistributedDataParallel`."""


class WholeBlock(nn.Module):
    """The computation of the original block, as one function that takes and returns a tensor.

    Args:
        block: The converted block.
        kind: Its original class.
        name: Its name, for error messages.
    """

    def __init__(self, block: nn.Module, kind: type[nn.Module], name: str):
        super().__init__()
        self.block = block
        self.name = name
        self._kind = kind
        self.wrapping: Wrapping = (None, ())
        """What the block returns around its tensor."""

    def _get_name(self) -> str:
        """Return the name of the block for error messages."""
        return self.name

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the block, and return the tensor in its output.

        Raises:
            TypeError: The block returns more than one tensor.
            ValueError: A second run would change an argument again, or the block changes the shape.
        """
        output = self._kind.forward(self.block, x, *args, **kwargs)
        y = self._only_tensor(output)
        if y.shape != x.shape:
            raise ValueError(
                f"`{self.name}` changes the shape of its stream from {tuple(x.shape)} to {tuple(y.shape)}, so the two "
                "streams cannot be combined; convert the blocks before and after it in two calls."
            )
        return y

    def _only_tensor(self, output: Any) -> Tensor:
        if isinstance(output, Tensor):
            self.wrapping = (None, ())
            return output
        is_plain = type(output) in (tuple, list) and output and isinstance(output[0], Tensor)
        if not is_plain or any(value is not None for value in output[1:]):
            inside = f" of {len(output)} values" if isinstance(output, tuple | list) else ""
            raise TypeError(
                f"`{self.name}` returned a {type(output).__name__}{inside} and not a single tensor, so the rest would "
                "be lost when its stream is rebuilt; turn off what the block returns in addition (such as caches or "
                "attention weights), or convert other blocks."
            )
        self.wrapping = (type(output), tuple(output[1:]))
        first: Tensor = output[0]
        return first

    def wrap(self, y: Tensor) -> Any:
        """Return `y` as the block returns it: alone, or in a tuple."""
        kind, rest = self.wrapping
        return y if kind is None else kind((y, *rest))


class Branch(nn.Module):
    """Modules of a block that run one after the other, as a residual function.

    Args:
        block: The block.
        kind: Its original class.
        name: Name of the block.
        path: Names of the modules.

    Raises:
        ValueError: The block has no module of a name.
    """

    def __init__(self, block: nn.Module, kind: type[nn.Module], name: str, path: Sequence[str]):
        super().__init__()
        self.name = name
        self._kind = kind
        self.path = tuple(path)
        """Names of the modules."""
        self.steps = nn.ModuleList([self._step_of(block, step) for step in path])

    def _step_of(self, block: nn.Module, step: str) -> nn.Module:
        try:
            return block.get_submodule(step)
        except AttributeError:
            names = ", ".join(child for child, _ in block.named_children())
            raise ValueError(
                f"`branches` names {step!r}, which `{self.name}` (={self._kind.__name__}) does not have; it has "
                f"{names}."
            ) from None

    def _get_name(self) -> str:
        """Return the name of the block for error messages."""
        return self.name

    def is_current(self, block: nn.Module) -> bool:
        """Return whether the modules are still the ones that `block` has by these names."""
        for step, known in zip(self.path, self.steps, strict=True):
            module: nn.Module | None = block
            for name in step.split("."):
                module = None if module is None else module._modules.get(name)
            if module is not known:
                return False
        return True

    def renewed(self, block: nn.Module) -> "Branch":
        """Return the branch with the modules that `block` has now.

        Raises:
            ValueError: The block has no module of a name.
        """
        return Branch(block, self._kind, self.name, self.path)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the modules. Each gets the arguments of the block whose names it knows."""
        given = _named(self._kind, x, args, kwargs) if args or kwargs else {}
        for step in self.steps:
            output = step(x, **_known(step, given)) if given else step(x)
            x = output[0] if isinstance(output, tuple | list) else output
        return x

    def takes(self, name: str) -> bool:
        """Return whether a module of the branch gets the argument of the block with this name."""
        return any(_known(step, {name: None}) for step in self.steps)


def _named(kind: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a block by name, without the stream."""
    bound = signature_of(kind).bind(None, x, *args, **kwargs)
    named: dict[str, Any] = {}
    for number, (name, value) in enumerate(bound.arguments.items()):
        way = bound.signature.parameters[name].kind
        if way is inspect.Parameter.VAR_KEYWORD:
            named |= value
        elif number > 1 and way is not inspect.Parameter.VAR_POSITIONAL:
            named[name] = value
    return named


def untaken_arguments(kind: Any, branches: Sequence[Branch]) -> dict[str, int]:
    """Return the arguments of a block that no module of its branches takes: the index of each, without the stream."""
    parameters = list(signature_of(kind).parameters.values())[2:]
    return {
        parameter.name: sys.maxsize if parameter.kind is parameter.KEYWORD_ONLY else index
        for index, parameter in enumerate(parameters)
        if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and not any(branch.takes(parameter.name) for branch in branches)
    }


def _known(step: nn.Module, given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments whose names a module knows."""
    names = _names(step)
    return given if names is None else {name: value for name, value in given.items() if name in names}


def _names(step: nn.Module) -> frozenset[str] | None:
    """Return the names of the arguments that a module takes in addition to its input; None if it takes any."""
    if isinstance(step, torch.jit.ScriptModule):
        schema: Any = step.forward.schema  # type: ignore[attr-defined]
        return frozenset([argument.name for argument in schema.arguments[2:]])
    if (compiled := step._modules.get("_orig_mod")) is not None:  # Its class has no signature.
        return _names(compiled)
    names = _names_of(type(step))
    inner = [step._modules.get(name) for name in _WRAPPED] if names is None else []
    return next((_names(module) for module in inner if module is not None), names)


def _names_of_class(kind: type[nn.Module]) -> frozenset[str] | None:
    parameters = signature_of(kind).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return frozenset(list(parameters)[2:])


def _signature_of_class(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)


# Type checkers do not accept a class of modules as a key.
_cached = functools.lru_cache(maxsize=256)
_names_of: Callable[[Any], frozenset[str] | None] = _cached(_names_of_class)
signature_of: Callable[[Any], inspect.Signature] = _cached(_signature_of_class)
