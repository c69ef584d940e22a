"""Modules in a row that are not reversible, under one policy."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from revnet.nn._policy import AbstractModulePolicy, AbstractPolicy, Store
from revnet.nn._policy_holder import AbstractPolicyHolder, PolicyUnit, one_for_each

_STORE = Store()


class PolicySequential(nn.Sequential, AbstractPolicyHolder):
    """An `nn.Sequential` that runs as one unit under a policy: a stem, a head, a stage that is not reversible.

    Under `Checkpoint()` only its input is kept, and all its activations are computed again at once. Buffers, such as
    batch-norm statistics, count once, and dropout draws the same mask again.

    Args:
        modules: The modules, or one ordered dict of them, as for `nn.Sequential`.
        policy: `Store()` keeps the activations, `Checkpoint()` computes them again, `Offload()` keeps them on the host.

    Raises:
        TypeError: `policy` is none, or one for reversible blocks.
    """

    def __init__(self, *modules: Any, policy: AbstractModulePolicy | str = _STORE):
        super().__init__(*modules)
        self.set_policies(policy)

    @property
    def policy_units(self) -> list[PolicyUnit]:
        """The whole, as one unit."""
        return [PolicyUnit("", (self,), is_reversible=False)]

    @property
    def policies(self) -> tuple[AbstractPolicy, ...]:
        """The one policy."""
        return (self._policy,)

    def set_policies(self, policy: AbstractPolicy | str | Sequence[AbstractPolicy | str]) -> None:
        """Set the policy; the next forward pass follows it."""
        (self._policy,) = one_for_each(policy, self.policy_units)

    def forward(self, x: Any) -> Any:
        """Run the modules in order."""
        if self._policy == _STORE:
            return super().forward(x)
        assert isinstance(self._policy, AbstractModulePolicy)
        return self._policy.call(nn.Sequential(*self), (x,), {})

    def extra_repr(self) -> str:
        """The policy, if it is another than the default, for `repr`."""
        return "" if self._policy == _STORE else f"policy={self._policy}"
