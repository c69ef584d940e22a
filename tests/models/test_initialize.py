import math

import pytest
import torch
from torch import nn

from revnet.models import ResNet, RevNet


@pytest.mark.parametrize("network", [ResNet, RevNet])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_initial_weights_follow_the_official_code(network, block):
    model = network(num_blocks=(1, 1), widths=(64, 64, 64), block=block, stem="large", num_classes=100)
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) >= 5
    for conv in convs:
        assert conv.bias is None
        deviation = math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))
        assert conv.weight.abs().max() <= 2 * deviation
        # A normal truncated at two deviations has 0.8796 of the deviation. Five standard errors of the estimate.
        tolerance = 5 / math.sqrt(2 * conv.weight.numel())
        assert conv.weight.std().item() == pytest.approx(0.8796 * deviation, rel=tolerance)
        assert abs(conv.weight.mean().item()) < 5 * deviation / math.sqrt(conv.weight.numel())
    bound = math.sqrt(3 / model.num_features)
    weight = model.head.weight
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert torch.equal(model.head.bias, torch.zeros(100))


@pytest.mark.parametrize("network", [ResNet, RevNet])
def test_batch_norm_has_the_official_constants(network):
    model = network(num_blocks=(1, 2), widths=(4, 4, 8), block="bottleneck")
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}
    for norm in norms:
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        assert torch.equal(norm.bias, torch.zeros_like(norm.bias))
        assert torch.equal(norm.running_mean, torch.zeros_like(norm.bias))
        assert torch.equal(norm.running_var, torch.ones_like(norm.bias))


def test_same_seed_gives_same_weights():
    def make(**options):
        torch.manual_seed(5)
        return RevNet(num_blocks=(1, 2), widths=(4, 4, 8), **options)

    for a, b in zip(make().parameters(), make().parameters(), strict=True):
        assert torch.equal(a, b)
