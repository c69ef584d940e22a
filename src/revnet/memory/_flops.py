"""Arithmetic of one forward pass, counted."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


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
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*inputs)
    finally:
        model.train(was_training)
    return int(counter.get_total_flops())
