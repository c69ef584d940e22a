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

    All other units keep their policies; `find_unplanned` says why.

    Args:
        model: The model.
        policies: Policies to choose from; a unit uses those that it accepts.
        log: Log of one step of the model.
    """
    starts = {id(call.module): call.start_event for call in log.calls}
    units = _all_units(model, policies)
    planned = [unit for unit, obstacle in zip(units, _obstacles(units, log), strict=True) if not obstacle]
    return sorted(planned, key=lambda unit: starts[id(unit.functions[0])])


def find_unplanned(model: nn.Module, policies: Sequence[AbstractPolicy], log: StepLog) -> dict[str, str]:
    """Return the units that a plan cannot decide on, with a phrase that says why, by name.

    These are units that did not run, units that ran more than once or share a function, so that one policy acts at
    several points of the chain, and units that contain other units.
    """
    units = _all_units(model, policies)
    return {unit.name: reason for unit, reason in zip(units, _obstacles(units, log), strict=True) if reason}


def other_units(model: nn.Module, units: Sequence[UnitInModel]) -> tuple[str, ...]:
    """Return the names of the units of a model that are not among `units`."""
    names = {unit.name for unit in units}
    return tuple(unit.name for unit in _all_units(model, ()) if unit.name not in names)


def _all_units(model: nn.Module, policies: Sequence[AbstractPolicy]) -> list[UnitInModel]:
    return [
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


def _obstacles(units: Sequence[UnitInModel], log: StepLog) -> list[str]:
    """Return for each unit why a plan cannot decide on it; empty if it can."""
    uses = Counter(id(function) for unit in units for function in unit.functions)
    num_calls = Counter(id(call.module) for call in log.calls)

    def obstacle_of(unit: UnitInModel) -> str:
        counts = [num_calls[id(function)] for function in unit.functions]
        own = {id(function) for function in unit.functions}
        if not unit.choices:
            return "accepts none of the policies"
        if not all(counts):
            return "did not run"
        if any(count > 1 for count in counts):
            return f"ran {max(counts)} times"
        if any(uses[id(function)] > 1 for function in unit.functions):
            return "shares a function with another unit"
        inside = (id(module) for function in unit.functions for module in function.modules())
        if any(number in uses and number not in own for number in inside):
            return "contains other units"
        return ""

    return list(map(obstacle_of, units))


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
