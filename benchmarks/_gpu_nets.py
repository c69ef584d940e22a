"""The networks of `gpu.py`, with inputs, a loss and a training step."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet import AbstractPolicy, Reverse, create_model, set_policy
from revnet.models import ResNet, ReversibleTransformer, RevNet, published_image_size

OPTIMIZER = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
VOCAB_SIZE = 256
TINY: dict[str, Callable[[], nn.Module]] = {
    "tiny revnet": partial(RevNet, num_blocks=(2, 1), widths=(8, 8, 8)),
    "tiny resnet": partial(ResNet, num_blocks=(2, 1), widths=(8, 8, 8)),
}
TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "transformer": partial(
        ReversibleTransformer, vocab_size=VOCAB_SIZE, dim=512, depth=12, num_heads=8, max_length=65536
    ),
    "tiny transformer": partial(ReversibleTransformer, vocab_size=VOCAB_SIZE, dim=8, depth=2, num_heads=2),
}


def make(name: str, policy: AbstractPolicy | None = None) -> nn.Module:
    """Return a network by name, with `policy`. None keeps its default policy."""
    if name in TRANSFORMERS:
        model = TRANSFORMERS[name]()
    else:
        # Channels-last, as in `revnet train`.
        model = (TINY[name]() if name in TINY else create_model(name)).to(memory_format=torch.channels_last)
    if policy not in (None, Reverse()):
        set_policy(model, policy)
    return model


def inputs_of(name: str, size: int) -> Tensor:
    """Return `size` images, or one sequence of `size` tokens."""
    if name in TRANSFORMERS:
        return torch.zeros(1, size, dtype=torch.int64)
    pixels = 8 if name in TINY else published_image_size(name)
    return torch.randn(size, 3, pixels, pixels)


def loss_of(logits: Tensor) -> Tensor:
    """Return the cross-entropy for labels that are all 0."""
    logits = logits.flatten(0, -2)
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def training_step(
    model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, autocast: torch.dtype | None = None
) -> None:
    """Run one training step, and clear the gradients after the update."""
    with torch.autocast(x.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
        loss = loss_of(model(x))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
