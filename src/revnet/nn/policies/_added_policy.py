"""Give a policy to a module of any class, in place.

The class of the module is replaced by a subclass whose `forward` runs the original one under the policy.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from revnet.engine._tracing import refuse, runs_plainly
from revnet.nn._exchanged_class import derived_class, exchange_class, reduce_parts
from revnet.nn.policies._body import Body
from revnet.nn.policies._has_policies import HasPolicies, PolicyUnit, broadcast_policy
from revnet.nn.policies._policy import AbstractModulePolicy, AbstractPolicy, Store

_STORE = Store()
RESERVED = ("policies", "policy_units", "set_policies")
"""Attributes that a module with an added policy has, so that its own class must not have them."""


class AddedPolicy(HasPolicies):
    """Base of the classes of modules that were given a policy; it is mixed with the module's own class."""

    # Class attributes, because the class of a module may be replaced without calling its constructor, as copies do.
    _added_policy: AbstractModulePolicy = _STORE
    _added_name: str = ""
    _class_before: type[nn.Module]

    @property
    def policy_units(self) -> list[PolicyUnit]:
        """The module, as one unit."""
        return [PolicyUnit("", (self,), is_reversible=False)]  # type: ignore[arg-type]

    @property
    def policies(self) -> tuple[AbstractPolicy, ...]:
        """The policy, in a tuple of one."""
        return (self._added_policy,)

    def set_policies(self, policy: AbstractPolicy | str | Sequence[AbstractPolicy | str]) -> None:
        """Set the policy. The next forward pass uses it."""
        (policy,) = broadcast_policy(policy, self.policy_units)
        assert isinstance(policy, AbstractModulePolicy)
        vars(self)["_added_policy"] = policy


def add_policy(module: nn.Module, name: str) -> None:
    """Give `module` a policy, which is `Store()` at first. `name` is its name in error messages.

    Raises:
        TypeError: The class of the module cannot be combined with another one.
    """
    way_out = "wrap the block in a `PolicySequential` instead"
    exchange_class(module, class_with_policy, name, action="given a policy", way_out=way_out)
    vars(module)["_added_name"] = name


def remove_policy(module: AddedPolicy) -> None:
    """Take the policy of a module away."""
    module.__class__ = module._class_before  # type: ignore[assignment]
    for name in ("_added_policy", "_added_name"):
        vars(module).pop(name, None)


def new_with_policy(kind: type[nn.Module]) -> nn.Module:
    """Return a module of class `kind` with a policy, without calling its constructor."""
    with_policy = class_with_policy(kind)
    return with_policy.__new__(with_policy)


def class_with_policy(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `kind` whose instances have a policy; the same one in each call."""
    return derived_class(kind, AddedPolicy, "_class_before", _body_of)


def _body_of(kind: type[nn.Module]) -> dict[str, Any]:
    # Built here, since `torch.compile` does not trace its parts.
    refusal = (
        f"a {kind.__name__} whose activations are recomputed or offloaded cannot be compiled as a part of the whole "
        "model; give it the policy `Store()` before compiling, or compile the modules inside it, each by its method "
        "`compile`."
    )

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        policy = self._added_policy
        if policy == _STORE or not torch.is_grad_enabled() or runs_plainly():
            return kind.forward(self, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling():
            refuse(refusal)
        return policy.call(Body(self, kind, self._added_name), args, kwargs)

    return {"forward": forward, "extra_repr": _extra_repr, "__reduce_ex__": _reduce}


def _extra_repr(self: Any) -> str:
    """Return what the module itself shows, and the policy if it differs from the default."""
    own: str = self._class_before.extra_repr(self)
    return own if self._added_policy == _STORE else ", ".join(filter(None, [own, f"policy={self._added_policy}"]))


def _reduce(self: Any, protocol: Any) -> str | tuple[Any, ...]:
    """Return how to copy or pickle the module, whose class cannot be found by its name."""
    kind = self._class_before
    parts, rest = reduce_parts(self, kind, protocol)
    # If the class has its own way, its copies have no policy.
    return parts if rest is None else (new_with_policy, (kind,), *rest)
