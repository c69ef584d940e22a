"""A sequence of ordinary modules that runs under a policy."""

from collections import OrderedDict
from typing import Any

from torch import nn

from revnet._checks import check_module
from revnet.nn.policies._body import Body
from revnet.nn.policies._has_gradient_checkpointing import HasGradientCheckpointing
from revnet.nn.policies._has_policies import HasSinglePolicy, PolicyUnit
from revnet.nn.policies._policy import AbstractModulePolicy, Store

_STORE = Store()


class PolicySequential(nn.Sequential, HasSinglePolicy, HasGradientCheckpointing):
    """An `nn.Sequential` that runs as one unit under a policy, such as a stem, a head, or a stage of ordinary blocks.

    Under `Checkpoint()` the unit keeps only its input and computes all its activations again at once. Batch-norm
    statistics and other buffers are updated only once, and dropout draws the same mask again.

    Args:
        modules: The modules, or one ordered dict of them, as for `nn.Sequential`.
        policy: The policy, or its name. `Store()` keeps the activations, `Checkpoint()` computes them again, and
            `Offload()` keeps them on the host.

    Raises:
        TypeError: A module is not an `nn.Module`, or `policy` is not a policy that ordinary modules accept.
        ValueError: No policy has this name.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet import Checkpoint, PolicySequential
        >>> stem = PolicySequential(nn.Linear(3, 8), nn.GELU(), policy=Checkpoint())
        >>> stem(torch.ones(2, 3)).shape
        torch.Size([2, 8])
        >>> stem.set_policies("store")
    """

    def __init__(self, *modules: Any, policy: AbstractModulePolicy | str = _STORE):
        if not (len(modules) == 1 and isinstance(modules[0], OrderedDict)):
            for index, module in enumerate(modules):
                check_module(f"modules[{index}]", module, hint="wrap the function in a module")
        super().__init__(*modules)
        self.set_policies(policy)

    @property
    def policy_units(self) -> list[PolicyUnit]:
        """The whole sequence, as one unit."""
        return [PolicyUnit("", (self,), is_reversible=False)]

    def forward(self, x: Any) -> Any:
        """Run the modules in order."""
        if self._policy == _STORE:
            return super().forward(x)
        assert isinstance(self._policy, AbstractModulePolicy)
        return self._policy.call(Body(self, nn.Sequential), (x,), {})

    def extra_repr(self) -> str:
        """Return the policy if it differs from the default, for `repr`."""
        return "" if self._policy == _STORE else f"policy={self._policy}"
