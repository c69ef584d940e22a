"""The units of a model that a plan decides on, in the order in which they run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from revnet.memory._log import StepLog
from revnet.nn import AbstractPolicy, policy_holders


@dataclass(frozen=True, eq=False)
class Unit:
    """A unit of a policy holder, with its place in the model."""

    name: str
    """Where it is: "stages.1.reversible.blocks.3"."""
    holder: str
    """The name of the module that holds its policy."""
    index: int
    """Which of the holder's units it is."""
    functions: tuple[nn.Module, ...]
    """What runs under the policy, in order."""
    choices: tuple[AbstractPolicy, ...]
    """The policies that it may have."""


def find_units(model: nn.Module, policies: Sequence[AbstractPolicy], log: StepLog) -> list[Unit]:
    """The units that a plan can decide on, in the order of the forward pass.

    The others keep their policies: those that did not run; those that ran more than once, or share a function, so that
    one policy has several places in the chain; and those around other units.

    Args:
        model: The model.
        policies: What a unit may have, if it accepts it.
        log: Of one step of the model.
    """
    units = [
        Unit(
            name=".".join(filter(None, (holder_name, unit.name))),
            holder=holder_name,
            index=index,
            functions=unit.functions,
            choices=tuple(policy for policy in policies if unit.accepts(policy)),
        )
        for holder_name, holder in policy_holders(model).items()
        for index, unit in enumerate(holder.policy_units)
    ]
    uses = Counter(id(function) for unit in units for function in unit.functions)
    num_calls = Counter(id(call.module) for call in log.calls)
    starts = {id(call.module): call.start_event for call in log.calls}

    def is_single(unit: Unit) -> bool:
        return all(num_calls[id(function)] == uses[id(function)] == 1 for function in unit.functions)

    def is_around_others(unit: Unit) -> bool:
        own = {id(function) for function in unit.functions}
        return any(id(module) in uses.keys() - own for function in unit.functions for module in function.modules())

    planned = [unit for unit in units if unit.choices and is_single(unit) and not is_around_others(unit)]
    return sorted(planned, key=lambda unit: starts[id(unit.functions[0])])


def assign(model: nn.Module, units: Sequence[Unit], policies: Sequence[AbstractPolicy]) -> None:
    """Give each unit its policy."""
    set_policies(model, {(unit.holder, unit.index): policy for unit, policy in zip(units, policies, strict=True)})


def set_policies(model: nn.Module, policies: Mapping[tuple[str, int], AbstractPolicy]) -> None:
    """Give units their policies by the name of their holder and their number in it; others keep theirs."""
    for name, holder in policy_holders(model).items():
        own = enumerate(holder.policies)
        holder.set_policies([policies.get((name, index), policy) for index, policy in own])
