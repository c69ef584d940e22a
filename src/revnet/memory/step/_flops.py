"""Count floating-point operations."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
FLOP_FORMULAS = {
    # The CPU's attention kernel does the same arithmetic as the GPU's, but PyTorch has no formula for it.
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
    **flop_registry,
}
"""Formulas by operation; each takes the operation's arguments, and its result as `out_val`."""


def count_flops(model: nn.Module, *inputs: Any) -> int:
    """Count the floating-point operations of one forward pass, two for each multiply-add.

    As in `torch.utils.flop_counter`, convolutions, matrix products and attention count; normalization and activation
    functions do not. A model on the `meta` device is counted without computing anything.

    Args:
        model: Any module. It is counted in evaluation mode; its own mode is restored.
        inputs: Arguments of the model.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), FlopCounter() as counter:
            model(*inputs)
    finally:
        model.train(was_training)
    return counter.flops


class FlopCounter(TorchDispatchMode):
    """Count the floating-point operations that run inside, backward passes and their recomputations included.

    `flops` counts the same operations as `count_flops`, two for each multiply-add.

    Unlike PyTorch's `FlopCounterMode`, it does not track modules, which would keep activations of checkpoints alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = FLOP_FORMULAS.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        return result
