"""Arithmetic, counted."""

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
FLOP_FORMULAS = {
    # The CPU's kernel of attention does what the GPU's does, but PyTorch has no formula for it.
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
    **flop_registry,
}
"""The arithmetic of an operation, from its arguments and `out_val`, its result."""


def count_flops(model: nn.Module, *inputs: Any) -> int:
    """Count the floating-point operations of one forward pass, two for each multiply-add.

    Convolutions, matrix products and attention are counted, as `torch.utils.flop_counter` does; normalisation and
    activations are not. Works on the `meta` device too, without computing anything.

    Args:
        model: Any module. Counted in evaluation mode, and left in the mode in which it was.
        inputs: Its arguments.
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
    """Count the arithmetic of whatever runs inside: of a backward pass too, with all that it computes again.

    `flops` is two for each multiply-add of the operations that `count_flops` counts.

    PyTorch's own `FlopCounterMode` follows the modules too, and by that keeps activations of checkpoints alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = FLOP_FORMULAS.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        return result
