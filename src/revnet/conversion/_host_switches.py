"""The switches by which a host turns on checkpointing of its own."""

from torch import nn

from revnet.nn import HasGradientCheckpointing

_SWITCHES = ("gradient_checkpointing", "activation_checkpointing", "grad_checkpointing")
"""Attributes of modules in transformers and timm."""


def checkpoints_itself(module: nn.Module) -> str | None:
    """Return the name of the switch by which a module checkpoints blocks, or None if there is none that is on."""
    if isinstance(module, HasGradientCheckpointing):
        return None  # The same names only show its policies.
    return next((switch for switch in _SWITCHES if getattr(module, switch, False) is True), None)
