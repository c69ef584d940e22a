"""Modules whose activations are kept or computed again as a policy says, and all of them in a model."""

import abc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from revnet.nn._policy import AbstractModulePolicy, AbstractPolicy


class PolicyUnit(NamedTuple):
    """The smallest part of a model that has a policy of its own: a block, a stem."""

    name: str
    """Its place in the holder, "blocks.3"; empty if the holder is one unit."""
    functions: tuple[nn.Module, ...]
    """The modules that run under the policy, in order."""
    is_reversible: bool
    """Whether it consists of half-blocks, which any policy can run."""

    def accepts(self, policy: AbstractPolicy) -> bool:
        """Whether the unit can run under `policy`."""
        return self.is_reversible or isinstance(policy, AbstractModulePolicy)


class AbstractPolicyHolder(abc.ABC):
    """A module that has a policy for each of its units, which may be changed between steps."""

    @property
    @abc.abstractmethod
    def policy_units(self) -> list[PolicyUnit]:
        """The units in the order in which they run."""

    @property
    @abc.abstractmethod
    def policies(self) -> tuple[AbstractPolicy, ...]:
        """The policies, one for each unit."""

    @abc.abstractmethod
    def set_policies(self, policy: AbstractPolicy | Sequence[AbstractPolicy]) -> None:
        """Give all units one policy, or each its own; the next forward pass follows it."""


def policy_holders(model: nn.Module) -> dict[str, AbstractPolicyHolder]:
    """All modules of `model` that have policies, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AbstractPolicyHolder)}


def set_policy(model: nn.Module, policy: AbstractPolicy) -> None:
    """Give one policy to every unit of `model` that can take it; `Reverse()` is for reversible blocks alone.

    Args:
        model: A model with reversible sequences, or one of this library.
        policy: `Store()`, for instance, makes the stored twin.

    Raises:
        TypeError: `policy` is none.
        ValueError: No unit can take it.
    """
    if not isinstance(policy, AbstractPolicy):
        raise TypeError(f"`policy` (={policy!r}) must be a policy, such as `Reverse()` or `Store()`.")
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
    """Put all policies of `model` back on leaving."""
    before = [(holder, holder.policies) for holder in policy_holders(model).values()]
    try:
        yield
    finally:
        for holder, policies in before:
            holder.set_policies(policies)


def one_for_each(
    policy: AbstractPolicy | Sequence[AbstractPolicy], units: Sequence[PolicyUnit]
) -> tuple[AbstractPolicy, ...]:
    """The policies of `units`, checked.

    Raises:
        TypeError: One is no policy, or is for reversible blocks where the unit is none.
        ValueError: There are not as many as units.
    """
    if isinstance(policy, str) or not isinstance(policy, Sequence):
        policy = (policy,) * len(units)
    policies = tuple(policy)
    for each in policies:
        if not isinstance(each, AbstractPolicy):
            raise TypeError(f"`policy` (={each!r}) must be a policy: `Reverse()`, `Store()`, or one for each block.")
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
