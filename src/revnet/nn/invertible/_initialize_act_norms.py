"""Set the normalization layers of a flow from its first batch."""

from typing import Any

import torch
from torch import nn

from revnet._checks import check_module
from revnet.nn.invertible._act_norm import ActNorm
from revnet.nn.invertible._flow_step import FlowStep

_NORMS = (ActNorm, FlowStep)


def initialize_act_norms(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Run `model` once on its first batch, and set each `ActNorm` in it from what that layer receives.

    Call it before training, before the model is wrapped in `DistributedDataParallel`, which sends the parameters of the
    first process to the others. Layers that are set already, because the model was trained or loaded, stay as they are.
    Parameters that set themselves in the first training step could not be rebuilt by the backward pass.

    Args:
        model: A model that contains `ActNorm` or `FlowStep`, or is one.
        args: Arguments of its forward pass, such as some hundred images. No gradients are computed.
        kwargs: Keyword arguments of its forward pass.

    Raises:
        TypeError: `model` is not a module, or what a layer receives is not floating-point.
        ValueError: `model` has no such layer, or what a layer receives is empty or contains NaN or inf.

    References:
        Kingma and Dhariwal (2018), Glow, section 3.1: data-dependent initialization.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from revnet.nn import ActNorm, initialize_act_norms
        >>> model = nn.Sequential(ActNorm(3), nn.Conv2d(3, 8, 3), ActNorm(8))
        >>> initialize_act_norms(model, torch.rand(16, 3, 8, 8))
        >>> all(norm.is_initialized for norm in model if isinstance(norm, ActNorm))
        True
    """
    check_module("model", model)
    if not any(isinstance(module, _NORMS) for module in model.modules()):
        raise ValueError(
            f"`model` (={type(model).__name__}) has no `ActNorm` and no `FlowStep`; leave out the call, "
            "or add such layers."
        )
    handles = [
        module.register_forward_pre_hook(_initialize_before, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, _NORMS)
    ]
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _initialize_before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if isinstance(module, _NORMS):
        module.initialize(args[0] if args else kwargs["x"])
