"""Find the blocks of a model that a user names, or the ones that it repeats."""

from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from torch import nn

from revnet._checks import describe
from revnet.nn.policies._added_policy import AddedPolicy
from revnet.nn.policies._has_policies import HasPolicies

Blocks: TypeAlias = str | type[nn.Module] | nn.Module | Sequence[str | type[nn.Module] | nn.Module] | None
ACCEPTED_BLOCKS = "a path pattern such as 'blocks.*', a class, a module of the model, or a sequence of these"
_NEARLY_ALL = 0.75
"""Fraction of the largest number of parameters from which more and smaller blocks are preferred."""


def named_blocks(model: nn.Module, blocks: Blocks) -> dict[str, nn.Module]:
    """Return the modules of `model` that `blocks` names, by name, in the order of the model.

    Raises:
        TypeError: `blocks` or one of its entries has the wrong type.
        ValueError: An entry names no module, or a module that contains another one.
    """
    if blocks is None:
        return repeated_blocks(model)
    entries = [blocks] if isinstance(blocks, str | type | nn.Module) else blocks
    # A `ModuleList` and a `Sequential` are modules themselves.
    if not isinstance(entries, Sequence):
        raise TypeError(f"`blocks` (={describe(blocks)}) must be {ACCEPTED_BLOCKS}.")
    if not entries:
        raise ValueError(f"`blocks` (={describe(blocks)}) names no module; pass {ACCEPTED_BLOCKS}.")
    modules = {name: module for name, module in model.named_modules() if name}
    chosen: set[str] = set()
    for entry in entries:
        names = {name for name, module in modules.items() if _matches(name, module, entry)}
        if not names:
            kind = type(model).__name__
            raise ValueError(f"`blocks` holds {describe(entry)}, which is not in `model` (={kind}); {_hint(model)}.")
        chosen |= names
    for name in chosen:
        if (outer := next((other for other in chosen if name.startswith(f"{other}.")), None)) is not None:
            raise ValueError(
                f"`blocks` names `{outer}` and `{name}`, of which the first contains the second; name one of them."
            )
    return {name: module for name, module in modules.items() if name in chosen}


def _matches(name: str, module: nn.Module, entry: Any) -> bool:
    if isinstance(entry, nn.Module):
        return module is entry
    if isinstance(entry, type) and issubclass(entry, nn.Module):
        return isinstance(module, entry)
    if isinstance(entry, str):
        parts, patterns = name.split("."), entry.split(".")
        return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
    raise TypeError(f"`blocks` holds {describe(entry)}, which must be {ACCEPTED_BLOCKS}.")


def _hint(model: nn.Module) -> str:
    """Return a phrase that shows how the names of blocks look."""
    names = [name for name, _ in model.named_modules() if name]
    if not names:
        return "it contains no modules"
    repeated = list(repeated_blocks(model))
    return f"names look like {(repeated or names)[0]!r}, and `*` stands for one part between dots"


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks that a model repeats, by name, in the order of the model.

    A block has modules inside, and is in a `ModuleList` or `Sequential` with others of its class. Of the classes of
    such blocks, the one with the most parameters is taken. If another one has nearly the same number in more and
    smaller blocks, it is taken instead. The rest of the model is searched in the same way, such as the encoder of an
    encoder-decoder model. A `Sequential` is a block only if the model repeats no other class.
    """
    names = {module: name for name, module in model.named_modules()}
    groups = _groups(model, nn.ModuleList | nn.ModuleDict | nn.Sequential)
    groups = groups or _groups(model, nn.ModuleList | nn.ModuleDict)
    taken: dict[str, nn.Module] = {}
    while groups:
        sizes = {kind: sum(map(_num_parameters, members)) for kind, members in groups.items()}
        most = max(sizes.values())
        large = [kind for kind in groups if sizes[kind] >= _NEARLY_ALL * most]
        # Of blocks inside each other, the inner ones are more.
        best = max(large, key=lambda kind: (len(groups[kind]), sizes[kind]))
        members = groups[best]
        taken |= {names[member]: member for member in members}
        used = {inner for member in members for inner in member.modules()}
        rest = {kind: [other for other in own if used.isdisjoint(other.modules())] for kind, own in groups.items()}
        groups = {kind: own for kind, own in rest.items() if len(own) > 1}
    return {name: taken[name] for name in names.values() if name in taken}


def _groups(model: nn.Module, containers: Any) -> dict[type, list[nn.Module]]:
    """Return the modules that may be blocks by class; none of them contains another one of its class.

    Args:
        model: The model.
        containers: Classes whose modules are not blocks.
    """
    groups: dict[type, dict[nn.Module, None]] = {}
    repeated: set[type] = set()
    for container in _outside_units(model):
        if isinstance(container, nn.ModuleList | nn.Sequential):
            children = [child for child in container.children() if _is_block(child, containers)]
            repeated |= {kind for kind, count in Counter(map(class_of, children)).items() if count > 1}
            for child in children:
                groups.setdefault(class_of(child), {})[child] = None
    innermost = {
        kind: [member for member in own if not any(inner in own for inner in list(member.modules())[1:])]
        for kind, own in groups.items()
        if kind in repeated
    }
    return {kind: members for kind, members in innermost.items() if len(members) > 1}


def _outside_units(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that are not inside a module that has policies of its own."""
    if isinstance(module, HasPolicies) and not isinstance(module, AddedPolicy):
        return
    yield module
    for child in module.children():
        yield from _outside_units(child)


def _is_block(module: nn.Module, containers: Any) -> bool:
    """Return whether a module may be a block: it runs modules with parameters, and nothing in it has policies."""
    return (
        bool(module._modules)
        and not issubclass(class_of(module), containers)
        and next(module.parameters(), None) is not None
        and not any(isinstance(inner, HasPolicies) for inner in module.modules() if not isinstance(inner, AddedPolicy))
    )


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module, without the one that gives it a policy."""
    return module._class_before if isinstance(module, AddedPolicy) else type(module)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
