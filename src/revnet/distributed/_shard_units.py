"""Find the parts of a model that are sharded as units, and the modules at which streams begin and end."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from revnet.coupling import AbstractCoupling
from revnet.nn import AbstractReversibleBlock, HasSinglePolicy, PolicySequential

_LISTS = (nn.ModuleList, nn.ModuleDict)
"""Containers that are never called themselves."""


@dataclass(frozen=True)
class Unit:
    """A part of a model that runs as one: a reversible block, or another block that has a policy of its own."""

    name: str
    """Name of the module in the model."""
    module: nn.Module
    """Module of the unit."""
    is_reversible: bool
    """Whether the unit consists of half-blocks that update streams."""

    @property
    def parts(self) -> list[nn.Module]:
        """Modules with parameters that the unit calls, such as f and g, without modules inside other ones."""
        children = dict.fromkeys(_called_children(self.module))
        inside = {module for child in children for module in child.modules() if module is not child}
        return [child for child in children if child not in inside]

    @property
    def has_log_det(self) -> bool:
        """Whether the unit may compute a log-determinant, which leaves it next to its output."""
        module = self.module
        if not isinstance(module, AbstractReversibleBlock):
            return False
        return any(not half_block.coupling.is_additive for half_block in module.half_blocks())

    def parts_to_shard(self, unit: str) -> list[nn.Module]:
        """Return the modules to shard one by one: the whole unit, or its parts."""
        # FSDP gathers parameters when the gradient of an output arrives. The gradient of a log-determinant may arrive
        # before the gradient of the block's output; the outputs of the functions are in the paths of both.
        return self.parts if unit == "function" or self.has_log_det else [self.module]


def units_of(model: nn.Module) -> list[Unit]:
    """Return the units of `model` from the input to the output, without units inside other units."""
    units: dict[nn.Module, Unit] = {}

    def visit(name: str, module: nn.Module) -> None:
        is_reversible = isinstance(module, AbstractReversibleBlock)
        is_unit = is_reversible
        # A `PolicySequential` is a stem or a layer between levels, which stays with the rest of the model.
        if isinstance(module, HasSinglePolicy) and not isinstance(module, PolicySequential):
            is_unit, is_reversible = True, module.policy_units[0].is_reversible
        if is_unit:
            units.setdefault(module, Unit(name, module, is_reversible))
            return
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return list(units.values())


def shared_units(model: nn.Module, units: list[Unit]) -> set[nn.Module]:
    """Return the units that share a parameter with another unit or with the rest of the model."""
    inside = {id(module) for unit in units for module in unit.module.modules()}
    owners: Counter[int] = Counter()
    for unit in units:
        owners.update({id(parameter) for parameter in unit.module.parameters()})
    for module in model.modules():
        if id(module) not in inside:
            owners.update({id(parameter) for parameter in module.parameters(recurse=False)})
    return {unit.module for unit in units if any(owners[id(parameter)] > 1 for parameter in unit.module.parameters())}


def stream_modules(model: nn.Module, units: list[Unit]) -> list[nn.Module]:
    """Return the modules that take streams and return streams.

    All their parameters belong to reversible units, so nothing inside them needs the dtype of the other layers.
    """
    blocks = {unit.module for unit in units if unit.is_reversible}
    owned = {id(parameter) for block in blocks for parameter in block.parameters()}
    found: dict[nn.Module, None] = {}

    def visit(module: nn.Module) -> None:
        has_streams = module in blocks or any(child in blocks for child in module.modules())
        if has_streams and not isinstance(module, _LISTS) and all(id(p) in owned for p in module.parameters()):
            found[module] = None
        if module not in blocks:
            for child in module.children():
                visit(child)

    visit(model)
    return list(found)


def _called_children(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the children that have parameters. For a list, yield its entries instead."""
    for child in module.children():
        if isinstance(child, _LISTS):
            yield from _called_children(child)
        # The engine calls the methods of a coupling, and not the module.
        elif not isinstance(child, AbstractCoupling) and next(child.parameters(), None) is not None:
            yield child
