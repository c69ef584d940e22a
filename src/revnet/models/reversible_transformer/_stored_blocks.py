"""The layers of an ordinary transformer, each of which runs under a policy."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from revnet.nn import AbstractModulePolicy, AbstractPolicy, HasGradientCheckpointing, HasPolicies, PolicyUnit, Store
from revnet.nn.policies._has_policies import broadcast_policy

_STORE = Store()


class ResidualLayer(nn.Module):
    """A layer of an ordinary transformer: `x + f(x)`, and then `y + g(y)`.

    Args:
        f: Residual function of the attention.
        g: Residual function of the perceptron.

    Shape:
        x: (B, T, D). Output: the same.
    """

    def __init__(self, f: nn.Module, g: nn.Module):
        super().__init__()
        self.f = f
        self.g = g

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Compute the output of the layer. The other arguments are for the attention."""
        y: Tensor = x + self.f(x, **kwargs)
        return y + self.g(y)


class StoredBlocks(HasGradientCheckpointing, HasPolicies):
    """The layers of an ordinary transformer. They are not reversible, so the default policy is `Store()`.

    Args:
        functions: Residual functions f and g of each layer.
        policy: A policy for ordinary modules, or a sequence with one for each layer.

    Shape:
        x: (B, T, D). Output: the same.

    Raises:
        TypeError: A policy is for reversible blocks only.
    """

    def __init__(
        self,
        functions: Sequence[tuple[nn.Module, nn.Module]],
        *,
        policy: AbstractPolicy | str | Sequence[AbstractPolicy | str] = _STORE,
    ):
        super().__init__()
        self.blocks = nn.ModuleList([ResidualLayer(f, g) for f, g in functions])
        self.set_policies(policy)

    @property
    def policy_units(self) -> list[PolicyUnit]:
        """The layers, in order."""
        return [PolicyUnit(f"blocks.{index}", (block,), is_reversible=False) for index, block in enumerate(self.blocks)]

    @property
    def policies(self) -> tuple[AbstractPolicy, ...]:
        """The policies, one for each layer."""
        return self._policies

    def set_policies(self, policy: AbstractPolicy | str | Sequence[AbstractPolicy | str]) -> None:
        """Set one policy for all layers, or one policy for each layer. The next forward pass uses it."""
        self._policies = broadcast_policy(policy, self.policy_units)

    def forward(self, x: Tensor, *, f_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Tensor:
        """Run the layers in order. The other arguments are for their attention."""
        kwargs |= f_kwargs or {}
        for block, policy in zip(self.blocks, self._policies, strict=True):
            if policy == _STORE:
                x = block(x, **kwargs)
            else:
                assert isinstance(policy, AbstractModulePolicy)
                x = policy.call(block, (x,), kwargs)
        return x

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.blocks)

    def __getitem__(self, index: int) -> nn.Module:
        return self.blocks[index]
