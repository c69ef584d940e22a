"""The forward pass of a module, as a module that a policy can call."""

from typing import Any

from torch import nn

from revnet.engine._checkpoint import StandIn
from revnet.nn._exchanged_class import find_cache


class Body(StandIn):
    """A module without its hooks, which run once, outside of the policy.

    Args:
        owner: The module.
        kind: The class whose `forward` runs.
        name: The name of the module in error messages; if it is empty, the name of the class.
    """

    def __init__(self, owner: nn.Module, kind: type[nn.Module], name: str = ""):
        super().__init__(owner)
        self._kind = kind
        self._name = name

    def _get_name(self) -> str:
        """Return the name for error messages."""
        return self._name or self._kind.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward pass.

        Raises:
            ValueError: A second run would change an argument again.
        """
        if (cache := find_cache(args, kwargs)) is not None:
            raise ValueError(
                f"`{self._get_name()}` is given a {cache}, which a second run of the block would change again; call "
                "the model without it, as `use_cache=False` does in transformers, or set the policy `Store()`."
            )
        return self._kind.forward(self.owner, *args, **kwargs)
