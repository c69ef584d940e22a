"""Modules whose activations are kept or computed again as a policy says, and the policies of a whole model."""

import abc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from revnet._checks import check_module, describe
from revnet.nn._policy import AbstractModulePolicy, AbstractPolicy, Checkpoint, Offload, Reverse, Store

_POLICY_OF = {"reverse": Reverse(), "checkpoint": Checkpoint(), "offload": Offload(), "store": Store()}
"""The policies that names stand for."""


def as_policy(policy: AbstractPolicy | str, name: str = "policy") -> AbstractPolicy:
    """Return the policy that `policy` is or names.

    Args:
        policy: A policy, or the name of one: "reverse", "checkpoint", "offload" or "store".
        name: Name of the argument, for the error message.

    Raises:
        TypeError: `policy` is neither a policy nor a string.
        ValueError: No policy has this name.
    """
    if isinstance(policy, AbstractPolicy):
        return policy
    if isinstance(policy, str) and policy in _POLICY_OF:
        return _POLICY_OF[policy]
    error = ValueError if isinstance(policy, str) else TypeError
    raise error(
        f"`{name}` (={describe(policy)}) must be a policy: `Reverse()`, `Checkpoint()`, `Offload()` or `Store()`, or "
        "the name of one in lower case, such as 'store'."
    )


class PolicyUnit(NamedTuple):
    """The smallest part of a model that has a policy of its own, such as a block or a stem."""

    name: str
    """Name of the unit in its holder, such as "blocks.3". Empty if the holder is one unit."""
    functions: tuple[nn.Module, ...]
    """Modules that run under the policy, in order."""
    is_reversible: bool
    """Whether the unit consists of half-blocks, which any policy can run."""

    def accepts(self, policy: AbstractPolicy) -> bool:
        """Return whether the unit can run under `policy`."""
        return self.is_reversible or isinstance(policy, AbstractModulePolicy)


class AbstractPolicyHolder(abc.ABC):
    """A module that has a policy for each of its units. The policies may change between steps."""

    @property
    @abc.abstractmethod
    def policy_units(self) -> list[PolicyUnit]:
        """The units in the order in which they run."""

    @property
    @abc.abstractmethod
    def policies(self) -> tuple[AbstractPolicy, ...]:
        """The policies, one for each unit."""

    @abc.abstractmethod
    def set_policies(self, policy: Any) -> None:
        """Give all units one policy, or each its own. The next forward pass follows it.

        Args:
            policy: A policy or its name, or a sequence with one for each unit.
        """


def policy_holders(model: nn.Module) -> dict[str, AbstractPolicyHolder]:
    """Return all modules of `model` that have policies, by name."""
    check_module("model", model)
    return {name: module for name, module in model.named_modules() if isinstance(module, AbstractPolicyHolder)}


def set_policy(model: nn.Module, policy: AbstractPolicy | str) -> None:
    """Give one policy to every unit of `model` that can take it.

    `Reverse()` is for reversible blocks only. All other units keep the policy that they have.

    Args:
        model: A model that contains reversible sequences, or a model of this library.
        policy: A policy or its name. `Store()`, or "store", turns the model into its stored twin.

    Raises:
        TypeError: `model` is not a module, or `policy` is not a policy.
        ValueError: No unit can take the policy.
    """
    policy = as_policy(policy)
    found = False
    for holder in policy_holders(model).values():
        fits = [unit.accepts(policy) for unit in holder.policy_units]
        found = found or any(fits)
        holder.set_policies([policy if fit else old for fit, old in zip(fits, holder.policies, strict=True)])
    if not found:
        raise ValueError(
            f"`model` (={type(model).__name__}) has nothing that can take the policy {policy}; build it of "
            "`ReversibleSequential`, or wrap what is not reversible in a `PolicySequential`."
        )


@contextmanager
def restoring_policies(model: nn.Module) -> Iterator[None]:
    """Restore all policies of `model` on leaving the context."""
    before = [(holder, holder.policies) for holder in policy_holders(model).values()]
    try:
        yield
    finally:
        for holder, policies in before:
            holder.set_policies(policies)


def one_for_each(
    policy: AbstractPolicy | str | Sequence[AbstractPolicy | str], units: Sequence[PolicyUnit]
) -> tuple[AbstractPolicy, ...]:
    """Return the policies of `units`, checked.

    Args:
        policy: A policy or its name, or a sequence with one for each unit.
        units: The units.

    Raises:
        TypeError: An entry is not a policy, or it is for reversible blocks and the unit is not reversible. Or `units`
            is not a sequence of units.
        ValueError: No policy has this name, or the number of policies is not the number of units.
    """
    if (
        not isinstance(units, Sequence)
        or isinstance(units, str)
        or not all(isinstance(unit, PolicyUnit) for unit in units)
    ):
        raise TypeError(f"`units` (={describe(units)}) must be a sequence of `PolicyUnit`.")
    if isinstance(policy, str) or not isinstance(policy, Sequence):
        policies = (as_policy(policy),) * len(units)
    else:
        policies = tuple([as_policy(each, f"policy[{index}]") for index, each in enumerate(policy)])
        if policies == policy:  # A holder that gets its policies back keeps the very tuple.
            policies = policy
    if len(policies) != len(units):
        raise ValueError(
            f"`policy` has {len(policies)} entries for {len(units)} blocks; pass one policy, or one for each block."
        )
    for each, unit in zip(policies, units, strict=True):
        if not unit.accepts(each):
            raise TypeError(
                f"`policy` (={each!r}) is for reversible blocks, which {unit.name or 'this module'} is not; pass "
                "`Checkpoint()`, `Offload()` or `Store()`."
            )
    return policies
