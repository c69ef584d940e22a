"""Find the units of a model that a plan can decide on, and set their policies."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from revnet.engine import HalfBlock
from revnet.memory.step._step_log import StepLog
from revnet.nn import AbstractPolicy
from revnet.nn._whole_model import policy_holders
from revnet.nn.policies._has_policies import HasPolicies


@dataclass(frozen=True, eq=False)
class UnitInModel:
    """Unit of a policy holder, with its name in the model."""

    name: str
    """Name in the model, such as "stages.1.reversible.blocks.3"."""
    holder: str
    """Name of the module that holds its policy."""
    index: int
    """Index among the units of the holder."""
    functions: tuple[nn.Module, ...]
    """Modules that run under the policy, in order."""
    choices: tuple[AbstractPolicy, ...]
    """Policies to choose from."""
    half_blocks: tuple[HalfBlock, ...] = ()
    """The half-blocks of a reversible unit."""
    num_variants: int = 0
    """Number of variants of the first choice, which follow it."""

    @property
    def kinds(self) -> tuple[AbstractPolicy, ...]:
        """The choices without variants."""
        return (*self.choices[:1], *self.choices[1 + self.num_variants :])

    @property
    def variants(self) -> tuple[AbstractPolicy, ...]:
        """The variants of the first choice."""
        return self.choices[1 : 1 + self.num_variants]

    def with_variants(self, variants: Sequence[AbstractPolicy]) -> "UnitInModel":
        """Return the unit with variants of its first choice."""
        choices = (*self.kinds[:1], *variants, *self.kinds[1:])
        return replace(self, choices=choices, num_variants=len(variants))


def find_units(model: nn.Module, policies: Sequence[AbstractPolicy], log: StepLog) -> list[UnitInModel]:
    """Return the units that a plan can decide on, in the order of the forward pass.

    All other units keep their policies: units that did not run, units that ran more than once or share a function, so
    that one policy acts at several points of the chain, and units that contain other units.

    Args:
        model: The model.
        policies: Policies to choose from; a unit uses those that it accepts.
        log: Log of one step of the model.
    """
    units = [
        UnitInModel(
            name=".".join(filter(None, (holder_name, unit.name))),
            holder=holder_name,
            index=index,
            functions=unit.functions,
            choices=tuple(policy for policy in policies if unit.accepts(policy)),
            half_blocks=unit.half_blocks,
        )
        for holder_name, holder in policy_holders(model).items()
        for index, unit in enumerate(holder.policy_units)
    ]
    uses = Counter(id(function) for unit in units for function in unit.functions)
    num_calls = Counter(id(call.module) for call in log.calls)
    starts = {id(call.module): call.start_event for call in log.calls}

    def is_single(unit: UnitInModel) -> bool:
        return all(num_calls[id(function)] == uses[id(function)] == 1 for function in unit.functions)

    def contains_others(unit: UnitInModel) -> bool:
        own = {id(function) for function in unit.functions}
        inside = (id(module) for function in unit.functions for module in function.modules())
        return any(number in uses and number not in own for number in inside)

    planned = [unit for unit in units if unit.choices and is_single(unit) and not contains_others(unit)]
    return sorted(planned, key=lambda unit: starts[id(unit.functions[0])])


def assign(model: nn.Module, units: Sequence[UnitInModel], policies: Sequence[AbstractPolicy]) -> None:
    """Set the policy of each unit."""
    set_policies(model, {(unit.holder, unit.index): policy for unit, policy in zip(units, policies, strict=True)})


def set_policies(model: nn.Module, policies: Mapping[tuple[str, int], AbstractPolicy]) -> None:
    """Set policies by the name of the holder and the index of the unit in it; other units keep their policies.

    Raises:
        ValueError: The model has no such unit.
    """
    by_holder: dict[str, dict[int, AbstractPolicy]] = {}
    for (name, index), policy in policies.items():
        by_holder.setdefault(name, {})[index] = policy
    holders = {name: _holder(model, name, max(own)) for name, own in by_holder.items()}
    for name, holder in holders.items():
        holder.set_policies([by_holder[name].get(index, policy) for index, policy in enumerate(holder.policies)])


def _holder(model: nn.Module, name: str, last: int) -> HasPolicies:
    """Return the module of a name, which must have a unit of index `last`."""
    try:
        holder = model.get_submodule(name)
    except AttributeError:
        holder = None
    if not isinstance(holder, HasPolicies) or len(holder.policies) <= last:
        raise ValueError(
            f"`model` (={type(model).__name__}) has no unit {last} in `{name}`; a plan applies to the planned model "
            "and to models of the same structure."
        )
    return holder
