"""The functions of a converted block: the original block as a whole, or its branches, without its hooks."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


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
        self.kind_of_output: type | None = None
        """The class of a tuple or list that the block returns around its tensor."""
        self.rest: tuple[Any, ...] = ()
        """What follows the tensor in that tuple; only None."""

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
            self.kind_of_output, self.rest = None, ()
            return output
        is_plain = type(output) in (tuple, list) and output and isinstance(output[0], Tensor)
        if not is_plain or any(value is not None for value in output[1:]):
            inside = f" of {len(output)} values" if isinstance(output, tuple | list) else ""
            raise TypeError(
                f"`{self.name}` returned a {type(output).__name__}{inside} and not a single tensor, so the rest would "
                "be lost when its stream is rebuilt; turn off what the block returns in addition (such as caches or "
                "attention weights), or convert other blocks."
            )
        self.kind_of_output, self.rest = type(output), tuple(output[1:])
        first: Tensor = output[0]
        return first

    def wrap(self, y: Tensor) -> Any:
        """Return `y` as the block returns it: alone, or in a tuple."""
        return y if self.kind_of_output is None else self.kind_of_output((y, *self.rest))


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
        self._path = tuple(path)
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
        for step, known in zip(self._path, self.steps, strict=True):
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
        return Branch(block, self._kind, self.name, self._path)

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
