"""The training step whose memory is measured, as in `revnet train`: channels-last, SGD with momentum."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet import create_model
from revnet.models import published_image_size

OPTIMIZER = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def make(name: str) -> nn.Module:
    """Return a model by name, with its default policies."""
    return create_model(name).to(memory_format=torch.channels_last)


def images_of(name: str, batch_size: int) -> Tensor:
    """Return random images of the model's published size."""
    size = published_image_size(name)
    return torch.randn(batch_size, 3, size, size)


def on_meta(name: str, batch_size: int) -> tuple[nn.Module, Tensor]:
    """Return the model and the images on the meta device."""
    with torch.device("meta"):
        return make(name), images_of(name, batch_size)


def loss(logits: Tensor) -> Tensor:
    """Return the cross-entropy for labels that are all 0."""
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))
