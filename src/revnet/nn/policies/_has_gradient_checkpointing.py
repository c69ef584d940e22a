"""The switches of timm and transformers for gradient checkpointing, as policies."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from revnet._checks import check_bool, check_count, describe
from revnet.nn.policies._has_policies import HasPolicies, PolicyUnit
from revnet.nn.policies._policy import AbstractPolicy, Checkpoint, Offload, Reverse, Store

_STORE = Store()
_DEFAULTS = {"every_n_layers": 1, "offload": False}
"""Options that select policies, with their defaults."""
_OPTIONS = ("use_reentrant", *_DEFAULTS)
"""Keys of `gradient_checkpointing_kwargs`."""


class HasGradientCheckpointing(nn.Module):
    """A module whose policies trainers can switch under the names that timm and transformers use.

    All models of this library, `ReversibleSequential` and `PolicySequential` derive from it. Derive your own model from
    it instead of `nn.Module`, and the switches set the policies of all its parts, as `set_policy` does:

    * on: `Reverse()` for reversible blocks, and `Checkpoint()` for every other unit
    * on with `offload`: `Offload()` for all units
    * off: `Store()` for all units

    They replace the policies that were set before, such as a memory plan. PyTorch's checkpointing does not run.

    Example:
        >>> from torch import nn
        >>> from revnet import PolicySequential, ReversibleBlock, ReversibleSequential
        >>> from revnet.nn import HasGradientCheckpointing
        >>> class Network(HasGradientCheckpointing):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem = PolicySequential(nn.Linear(3, 4))
        ...         block = ReversibleBlock(nn.Linear(2, 2), nn.Linear(2, 2))
        ...         self.blocks = ReversibleSequential(block, policy="store")
        ...     def forward(self, x):
        ...         return self.blocks(self.stem(x))
        >>> model = Network()
        >>> model.set_grad_checkpointing()
        >>> model.stem.policies, model.blocks.policies
        ((Checkpoint(),), (Reverse(),))
    """

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save memory for activations, or keep them all. This is timm's name.

        Args:
            enable: Whether to save memory.

        Raises:
            TypeError: `enable` is not a bool.
            ValueError: `enable` is true, and the module has no unit with a policy.
        """
        check_bool(enable=enable)
        self._switch_policies(enable)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Save memory for activations. This is the name in transformers up to version 5.

        Args:
            gradient_checkpointing_kwargs: Options by name: `every_n_layers` and `offload`, as below, and
                `use_reentrant`, which has no effect. No other option exists.
            every_n_layers: Distance of the units that save memory; the units between them have the policy `Store()`.
                Reversible blocks and other units, such as a stem, are counted separately. The first of each saves
                memory.
            offload: Whether to keep activations in host memory instead of computing them again.

        Raises:
            TypeError: An option has the wrong type.
            ValueError: An option is unknown or given twice, `every_n_layers` is not positive, or the module has no unit
                with a policy.
        """
        options = _merge("gradient_checkpointing_kwargs", gradient_checkpointing_kwargs, every_n_layers, offload)
        self._switch_policies(True, *options)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations. This is the name in transformers up to version 5."""
        self._switch_policies(False)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Save memory for activations. This is the name in later versions of transformers.

        Args:
            activation_checkpointing_kwargs: Options by name, as in `gradient_checkpointing_enable`.
            every_n_layers: Distance of the units that save memory, as in `gradient_checkpointing_enable`.
            offload: Whether to keep activations in host memory instead of computing them again.

        Raises:
            TypeError: An option has the wrong type.
            ValueError: An option is unknown or given twice, `every_n_layers` is not positive, or the module has no unit
                with a policy.
        """
        options = _merge("activation_checkpointing_kwargs", activation_checkpointing_kwargs, every_n_layers, offload)
        self._switch_policies(True, *options)

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations. This is the name in later versions of transformers."""
        self._switch_policies(False)

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether any unit saves memory: its policy is not `Store()`. Setting it calls `set_grad_checkpointing`.

        A `PreTrainedModel` of transformers sets it on each of its modules, so its own
        `gradient_checkpointing_enable()` switches the sequences inside it.
        """
        return any(policy != _STORE for module in self._policy_modules() for policy in module.policies)

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.set_grad_checkpointing(enable)

    @property
    def grad_checkpointing(self) -> bool:
        """Whether any unit saves memory. This is timm's name. Setting it calls `set_grad_checkpointing`."""
        return self.gradient_checkpointing

    @grad_checkpointing.setter
    def grad_checkpointing(self, enable: bool) -> None:
        self.set_grad_checkpointing(enable)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any unit saves memory. This is the name in transformers up to version 5."""
        return self.gradient_checkpointing

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether any unit saves memory. This is the name in later versions of transformers."""
        return self.gradient_checkpointing

    def _policy_modules(self) -> list[HasPolicies]:
        return [module for module in self.modules() if isinstance(module, HasPolicies)]

    def _switch_policies(self, enable: bool, every_n_layers: int = 1, offload: bool = False) -> None:
        modules = self._policy_modules()
        if enable and not modules:
            raise ValueError(
                f"`{type(self).__name__}` has no unit with a policy; build it from `ReversibleSequential`, or wrap its "
                "modules in a `PolicySequential`."
            )
        counts = {True: 0, False: 0}  # of reversible and of other units so far
        for module in modules:
            policies: list[AbstractPolicy] = []
            for unit in module.policy_units:
                is_chosen = enable and counts[unit.is_reversible] % every_n_layers == 0
                counts[unit.is_reversible] += 1
                policies.append(_saving_policy(unit, offload) if is_chosen else _STORE)
            module.set_policies(policies)


def _saving_policy(unit: PolicyUnit, offload: bool) -> AbstractPolicy:
    if offload:
        return Offload()
    return Reverse() if unit.is_reversible else Checkpoint()


def _merge(name: str, kwargs: Mapping[str, Any] | None, every_n_layers: Any, offload: Any) -> tuple[int, bool]:
    """Return `every_n_layers` and `offload`, which a caller passes by themselves or in `kwargs`, called `name`."""
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(
            f"`{name}` (={describe(kwargs)}) must be a dict of options, such as {{'every_n_layers': 2}}, or None."
        )
    given = dict(kwargs or {})
    for key in given:
        if key not in _OPTIONS:
            raise ValueError(
                f"`{name}` has the key {describe(key)}, but the options are {', '.join(map(repr, _OPTIONS))}; leave "
                "it out, as PyTorch's checkpointing does not run here."
            )
    if given.get("use_reentrant") is not None:
        check_bool(use_reentrant=given["use_reentrant"])
    check_count("every_n_layers", every_n_layers)
    check_bool(offload=offload)
    options = {"every_n_layers": every_n_layers, "offload": offload}
    for key in options.keys() & given.keys():
        if options[key] != _DEFAULTS[key]:
            raise ValueError(f"`{key}` (={options[key]!r}) is also a key of `{name}`; pass it once.")
        options[key] = given[key]
    check_count("every_n_layers", options["every_n_layers"])
    check_bool(offload=options["offload"])
    return options["every_n_layers"], options["offload"]
