"""Modules that run their parts under policies."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from revnet._checks import describe
from revnet.engine import HalfBlock
from revnet.nn.policies._policy import AbstractModulePolicy, AbstractPolicy, Checkpoint, Offload, Reverse, Store

POLICY_OF = {"reverse": Reverse(), "checkpoint": Checkpoint(), "offload": Offload(), "store": Store()}
"""The policy for each name."""


def as_policy(policy: AbstractPolicy | str, name: str = "policy") -> AbstractPolicy:
    """Return `policy`, or the policy with this name.

    Args:
        policy: A policy, or the name of one: "reverse", "checkpoint", "offload" or "store".
        name: Name of the argument, for the error message.

    Raises:
        TypeError: `policy` is neither a policy nor a string.
        ValueError: No policy has this name.

    Example:
        >>> from revnet.nn.policies._has_policies import as_policy
        >>> as_policy("checkpoint")
        Checkpoint()
    """
    if isinstance(policy, AbstractPolicy):
        return policy
    if isinstance(policy, str) and policy in POLICY_OF:
        return POLICY_OF[policy]
    error = ValueError if isinstance(policy, str) else TypeError
    raise error(
        f"`{name}` (={describe(policy)}) must be a policy: `Reverse()`, `Checkpoint()`, `Offload()` or `Store()`, or "
        "the name of one in lower case, such as 'store'."
    )


@dataclass(frozen=True)
class PolicyUnit:
    """The smallest part of a model that has a policy of its own, such as a block or a stem.

    Example:
        >>> from torch import nn
        >>> from revnet import PolicySequential, Reverse, Store
        >>> (unit,) = PolicySequential(nn.Linear(2, 2)).policy_units
        >>> unit.accepts(Store()), unit.accepts(Reverse())
        (True, False)
    """

    name: str
    """Name of the unit in its module, such as "blocks.3". Empty if the module is one unit."""
    functions: tuple[nn.Module, ...]
    """Modules that run under the policy, in order."""
    is_reversible: bool
    """Whether the unit consists of half-blocks, which any policy can run."""
    half_blocks: tuple[HalfBlock, ...] = ()
    """The half-blocks, one for each function. Without them, memory plans do not choose `hold` and `keep` of
    `Reverse`."""

    def accepts(self, policy: AbstractPolicy) -> bool:
        """Return whether the unit can run under `policy`."""
        return self.is_reversible or isinstance(policy, AbstractModulePolicy)


class HasPolicies(abc.ABC):
    """A module that has a policy for each of its units. The policies may change between steps.

    Implement this interface to let `set_policy` and memory plans choose the policies of your own module.

    Example:
        >>> from torch import nn
        >>> from revnet import PolicySequential
        >>> from revnet.nn import HasPolicies
        >>> isinstance(PolicySequential(nn.Linear(2, 2)), HasPolicies)
        True
    """

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
        """Set one policy for all units, or one policy for each unit. The next forward pass uses it.

        Args:
            policy: A policy or its name, or a sequence with one for each unit.
        """


class HasSinglePolicy(HasPolicies):
    """A module that is one unit, and so has one policy. A subclass defines `policy_units`, a list of one unit.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import Checkpoint, set_policy
        >>> from revnet.nn import HasSinglePolicy, PolicyUnit
        >>> class Residual(nn.Module, HasSinglePolicy):
        ...     def __init__(self, f):
        ...         super().__init__()
        ...         self.f = f
        ...         self.set_policies("store")
        ...     @property
        ...     def policy_units(self):
        ...         return [PolicyUnit("", (self.f,), is_reversible=False)]
        ...     def forward(self, x):
        ...         return x + self.policies[0].call(self.f, (x,), {})
        >>> model = nn.Sequential(Residual(nn.Linear(2, 2)), Residual(nn.Linear(2, 2)))
        >>> set_policy(model, "checkpoint")
        >>> model[0].policies
        (Checkpoint(),)
    """

    _policy: AbstractPolicy

    @property
    def policies(self) -> tuple[AbstractPolicy, ...]:
        """The policy, in a tuple of one."""
        return (self._policy,)

    def set_policies(self, policy: AbstractPolicy | str | Sequence[AbstractPolicy | str]) -> None:
        """Set the policy. The next forward pass uses it."""
        (self._policy,) = broadcast_policy(policy, self.policy_units)


def broadcast_policy(
    policy: AbstractPolicy | str | Sequence[AbstractPolicy | str], units: Sequence[PolicyUnit]
) -> tuple[AbstractPolicy, ...]:
    """Return one policy for each unit, and check that the unit accepts it.

    Args:
        policy: A policy or its name, or a sequence with one for each unit.
        units: The units.

    Raises:
        TypeError: An entry is not a policy, or it needs reversible blocks and the unit has none. Or `units` is not a
            sequence of units.
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
        policies = tuple([as_policy(entry, f"policy[{index}]") for index, entry in enumerate(policy)])
        if policies == policy:  # Keep the tuple itself: sequences compare their policies by identity.
            policies = policy
    if len(policies) != len(units):
        raise ValueError(
            f"`policy` (of length {len(policies)}) must have one entry for each unit ({len(units)}); pass one policy, "
            "or one for each unit."
        )
    for unit_policy, unit in zip(policies, units, strict=True):
        if not unit.accepts(unit_policy):
            raise TypeError(
                f"`policy` (={unit_policy!r}) is for reversible blocks, and {unit.name or 'this module'} is not "
                "reversible; pass `Checkpoint()`, `Offload()` or `Store()`."
            )
    return policies
