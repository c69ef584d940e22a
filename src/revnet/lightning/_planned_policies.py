"""The policies of a plan as plain values, for a checkpoint."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from revnet.errors import CheckpointError
from revnet.memory import Plan
from revnet.nn import AbstractPolicy
from revnet.nn._whole_model import policy_holders
from revnet.nn.policies._plain_policy import describe_policy, read_policy

Row = list[Any]
"""Name of the module that holds a policy, index of its unit, and the policy: as plain values if they can express it."""


def rows_of(plan: Plan, prefix: str) -> list[Row]:
    """Return a row for each unit of the plan, without `prefix` before the names of modules."""
    return [
        [unit.holder.removeprefix(prefix), unit.index, describe_policy(unit.policy) or unit.policy]
        for unit in plan.units
    ]


def set_rows(model: nn.Module, rows: Sequence[Row]) -> None:
    """Set the policies of `model`; units without a row keep theirs.

    Raises:
        CheckpointError: The model lacks one of these units.
    """
    holders = policy_holders(model)
    policies = {name: list(holder.policies) for name, holder in holders.items()}
    for name, index, value in rows:
        if name not in policies or index >= len(policies[name]):
            raise CheckpointError(
                f"the checkpoint has a memory plan with the unit {index} of `{name}`, which {type(model).__name__} "
                "lacks; resume with the model that was trained, or leave out `ckpt_path`."
            )
        policies[name][index] = value if isinstance(value, AbstractPolicy) else read_policy(value)
    for name, holder in holders.items():
        holder.set_policies(policies[name])
