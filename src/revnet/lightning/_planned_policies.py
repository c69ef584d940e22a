"""The policies of a plan as plain values, for a checkpoint."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from revnet.errors import CheckpointError
from revnet.memory import Plan
from revnet.nn import AbstractPolicy, Checkpoint, Offload, Reverse, Store
from revnet.nn._whole_model import policy_holders

_KINDS: dict[str, type[AbstractPolicy]] = {kind.__name__: kind for kind in (Reverse, Checkpoint, Offload, Store)}

Row = list[Any]
"""Name of the module that holds a policy, index of its unit, kind of the policy, and arguments of the policy."""


def rows_of(plan: Plan, prefix: str) -> list[Row]:
    """Return a row for each unit of the plan, without `prefix` before the names of modules."""
    return [[unit.holder.removeprefix(prefix), unit.index, *_row_of(unit.policy)] for unit in plan.units]


def set_rows(model: nn.Module, rows: Sequence[Row]) -> None:
    """Set the policies of `model`; units without a row keep theirs.

    Raises:
        CheckpointError: The model lacks one of these units.
    """
    holders = policy_holders(model)
    policies = {name: list(holder.policies) for name, holder in holders.items()}
    for name, index, kind, arguments in rows:
        if name not in policies or index >= len(policies[name]):
            raise CheckpointError(
                f"the checkpoint has a memory plan with the unit {index} of `{name}`, which {type(model).__name__} "
                "lacks; resume with the model that was trained, or leave out `ckpt_path`."
            )
        policies[name][index] = kind if isinstance(kind, AbstractPolicy) else _KINDS[kind](**arguments)
    for name, holder in holders.items():
        holder.set_policies(policies[name])


def _row_of(policy: AbstractPolicy) -> tuple[Any, dict[str, Any]]:
    name = type(policy).__name__
    match policy:
        case Checkpoint() | Store():
            return name, {}
        case Offload():
            return name, {"overlap": policy.overlap}
        case Reverse() if _is_plain(policy.keep):
            keep = list(policy.keep) if isinstance(policy.keep, tuple) else policy.keep
            return name, {"hold": True if policy.hold is True else list(policy.hold), "keep": keep}  # type: ignore[arg-type]
    return policy, {}


def _is_plain(keep: Any) -> bool:
    return isinstance(keep, str | int) or (isinstance(keep, tuple) and all(isinstance(entry, str) for entry in keep))
