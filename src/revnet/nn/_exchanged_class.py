"""Replace the class of a module by a subclass that does more, in place.

Nothing else changes: the module has the same children, parameters, hooks and attributes under the same names, and it is
still an instance of its class. `torch.distributed.fsdp.fully_shard` and `torch.nn.utils.parametrize` use the same
technique.
"""

import copyreg
from collections.abc import Callable
from types import new_class
from typing import Any

from torch import nn

Kind = type[nn.Module]
ORIGINAL_CLASS = "_original_class"
"""Attribute of the class of a converted block that holds the class before."""
Parts = tuple[Any, ...]


def derived_class(kind: Kind, base: type, attribute: str, make_body: Callable[[Kind], dict[str, Any]]) -> Kind:
    """Return the subclass of `kind` and `base`, the same one in each call.

    Args:
        kind: Class of a module.
        base: Class that is mixed in.
        attribute: Name of the attribute of the subclass that holds `kind`.
        make_body: Function that returns the attributes of the subclass; it is called once for each `kind`.
    """
    for subclass in kind.__subclasses__():
        if issubclass(subclass, base) and vars(subclass).get(attribute) is kind:
            return subclass
    body = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= make_body(kind) | {attribute: kind}
    # Python allows the assignment of the class only if the module's own class is the first base. The name stays, since
    # other tools look up blocks by the names of their classes.
    return new_class(kind.__name__, (kind, base), exec_body=lambda namespace: namespace.update(body))


def exchange_class(module: nn.Module, derive: Callable[[Kind], Kind], name: str, *, action: str, way_out: str) -> None:
    """Replace the class of a module.

    Args:
        module: The module.
        derive: Function that returns the new class for the old one.
        name: Name of the module, for the error message.
        action: What cannot be done if this fails, as in "cannot be converted".
        way_out: What to do instead.

    Raises:
        TypeError: The class of the module cannot be combined with another one.
    """
    kind = type(module)
    try:
        module.__class__ = derive(kind)
    except TypeError as error:
        raise TypeError(
            f"`{name}` (={kind.__name__}) cannot be {action}, because its class cannot be combined with another one "
            f"({error}); {way_out}."
        ) from error


def reduce_parts(module: Any, kind: Kind, protocol: Any) -> tuple[str | Parts, Parts | None]:
    """Return how instances of `kind` are copied or pickled.

    The class of the module cannot be found by its name, so that a copy has to be created by a function.

    Returns:
        The result of `kind.__reduce_ex__`; and the part of it that follows the class, or None if `kind` has a way of
        its own.
    """
    parts = kind.__reduce_ex__(module, max(protocol, 2))
    is_usual = not isinstance(parts, str) and parts[0] is copyreg.__newobj__  # type: ignore[attr-defined]
    return parts, tuple(parts[2:]) if is_usual else None


def find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return the class of a cache among the arguments of a block, which a second run of the block would change."""
    return next((type(value).__name__ for value in (*args, *kwargs.values()) if is_cache(value)), None)


def is_cache(value: object) -> bool:
    """Return whether an argument is a cache, as transformers passes it to the blocks."""
    return any(base.__name__.endswith("Cache") for base in type(value).__mro__)


def is_converted(module: nn.Module) -> bool:
    """Return whether `revnet.convert` has replaced the class of a module."""
    return hasattr(type(module), ORIGINAL_CLASS)  # Inherited, if `fully_shard` has replaced the class once more.
