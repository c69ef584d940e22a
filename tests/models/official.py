"""The paper's networks once more, written from the official TensorFlow code: plain functions, one configuration.

It shares nothing with the library but the numbers in a model's parameters, which it takes one by one in their order, so
that a network of another structure runs out of them, leaves some over, or finds one of the wrong shape.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The fields of the official `cifar_configs.py` and `imagenet_configs.py` that define a network."""

    num_residual_units: tuple[int, ...]
    filters: tuple[int, ...]
    reversible: bool = False
    use_bottleneck: bool = False
    init_filter: int = 3
    init_stride: int = 1
    init_max_pool: bool = False


IMAGENET = {"use_bottleneck": True, "init_filter": 7, "init_stride": 2, "init_max_pool": True}

CONFIGS = {
    "resnet32": Config((5, 5, 5), (16, 16, 32, 64)),
    "resnet110": Config((18, 18, 18), (16, 16, 32, 64)),
    "resnet164": Config((18, 18, 18), (16, 16, 32, 64), use_bottleneck=True),
    "revnet38": Config((3, 3, 3), (32, 32, 64, 112), reversible=True),
    "revnet110": Config((9, 9, 9), (32, 32, 64, 128), reversible=True),
    "revnet164": Config((9, 9, 9), (32, 32, 64, 128), reversible=True, use_bottleneck=True),
    "resnet50": Config((3, 4, 6, 3), (64, 64, 128, 256, 512), **IMAGENET),
    "resnet101": Config((3, 4, 23, 3), (64, 64, 128, 256, 512), **IMAGENET),
    "revnet56": Config((2, 2, 3, 2), (128, 128, 256, 512, 832), reversible=True, **IMAGENET),
    "revnet104": Config((2, 2, 11, 2), (128, 128, 256, 512, 832), reversible=True, **IMAGENET),
}


class Official:
    """The official network in training mode, with the parameters of `model`.

    `moments` are the mean and the biased variance that each batch norm saw, in order.
    """

    def __init__(self, config: Config, model: nn.Module):
        self.config = config
        self.parameters = list(model.parameters())
        self.moments: list[tuple[Tensor, Tensor]] = []

    def take(self, *shape: int) -> Tensor:
        parameter = self.parameters.pop(0)
        assert parameter.shape == shape
        return parameter.detach()

    def logits(self, x: Tensor) -> Tensor:
        config = self.config
        filters = list(config.filters)
        h = self.conv(x, config.init_filter, x.shape[1], filters[0], config.init_stride)
        h = self.norm_relu(h)
        if config.init_max_pool:
            h = F.max_pool2d(pad_same(h, 3, 2, float("-inf")), 3, 2)
        if config.use_bottleneck:
            filters = [filters[0]] + [4 * count for count in filters[1:]]
        unit = self.reversible_unit if config.reversible else self.unit
        if config.reversible:
            h = (h[:, : filters[0] // 2], h[:, filters[0] // 2 :])
        for stage, num_units in enumerate(config.num_residual_units):
            for index in range(num_units):
                in_filter = filters[stage] if index == 0 else filters[stage + 1]
                stride = 2 if index == 0 and stage > 0 else 1
                h = unit(h, in_filter, filters[stage + 1], stride, no_activation=index == stage == 0)
        if config.reversible:
            h = torch.cat(h, dim=1)
        h = self.norm_relu(h).mean(dim=(2, 3))
        weight = self.take(self.parameters[0].shape[0], filters[-1])
        return h @ weight.T + self.take(weight.shape[0])

    def unit(self, x, in_filter, out_filter, stride, no_activation):
        residual = self.residual(x, in_filter, out_filter, stride, no_activation)
        return residual + self.shortcut(x, in_filter, out_filter, stride)

    def reversible_unit(self, x, in_filter, out_filter, stride, no_activation):
        x1, x2 = x
        x1_ = self.shortcut(x1, in_filter // 2, out_filter // 2, stride)
        x2_ = self.shortcut(x2, in_filter // 2, out_filter // 2, stride)
        y1 = x1_ + self.residual(x2, in_filter // 2, out_filter // 2, stride, no_activation)
        y2 = x2_ + self.residual(y1, out_filter // 2, out_filter // 2, 1, no_activation=False)
        return y1, y2

    def residual(self, x, in_filter, out_filter, stride, no_activation):
        if not no_activation:
            x = self.norm_relu(x)
        if not self.config.use_bottleneck:
            x = self.conv(x, 3, in_filter, out_filter, stride)
            return self.conv(self.norm_relu(x), 3, out_filter, out_filter, 1)
        x = self.conv(x, 1, in_filter, out_filter // 4, stride)
        x = self.conv(self.norm_relu(x), 3, out_filter // 4, out_filter // 4, 1)
        return self.conv(self.norm_relu(x), 1, out_filter // 4, out_filter, 1)

    def shortcut(self, x, in_filter, out_filter, stride):
        if self.config.use_bottleneck:
            if stride > 1 or in_filter != out_filter:
                x = self.conv(x, 1, in_filter, out_filter, stride)
            return x
        if stride > 1:
            x = F.avg_pool2d(x, stride, stride)
        zeros = x.new_zeros(x.shape[0], (out_filter - in_filter) // 2, *x.shape[2:])
        return torch.cat((zeros, x, zeros), dim=1)

    def conv(self, x, filter_size, in_filters, out_filters, stride):
        weight = self.take(out_filters, in_filters, filter_size, filter_size)
        return F.conv2d(pad_same(x, filter_size, stride, 0.0), weight, stride=stride)

    def norm_relu(self, x):
        gamma, beta = self.take(x.shape[1]), self.take(x.shape[1])
        mean = x.mean(dim=(0, 2, 3))
        variance = (x - mean[:, None, None]).square().mean(dim=(0, 2, 3))
        self.moments.append((mean, variance))
        scale = gamma / torch.sqrt(variance + 1e-3)
        return torch.clamp((x - mean[:, None, None]) * scale[:, None, None] + beta[:, None, None], min=0)


def pad_same(x: Tensor, kernel_size: int, stride: int, value: float) -> Tensor:
    """Pad like TensorFlow's SAME: ceil(size / stride) outputs, with an odd pixel of padding at the far end."""
    padding: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding, value=value)
