import math

import pytest
import torch
import torch.nn.functional as F

from revnet import create_model
from revnet.models import ResNet


@pytest.mark.parametrize(("num_classes", "num_parameters"), [(10, 464_154), (100, 470_004)])
def test_parameters_are_those_of_the_official_code(num_classes, num_parameters):
    model = create_model("resnet32", num_classes=num_classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_structure_is_that_of_the_official_code():
    model = create_model("resnet32")
    first, second = model.stages[0][0], model.stages[1][0]
    assert first.residual.norm1 is None, "the stem has just normalised and activated"
    assert model.stages[0][1].residual.norm1 is not None
    assert second.residual.norm1.num_features == 16
    assert second.residual.conv1.stride == (2, 2)
    assert second.shortcut.channel_padding == (8, 8)
    assert all(conv.bias is None for conv in model.modules() if isinstance(conv, torch.nn.Conv2d))
    norms = [norm for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.01)}


def test_shortcut_pools_and_pads_both_sides():
    x = torch.randn(1, 16, 4, 4)
    y = create_model("resnet32").stages[1][0].shortcut(x)
    assert torch.equal(y[:, 8:24], F.avg_pool2d(x, 2))
    assert torch.equal(y[:, :8], torch.zeros(1, 8, 2, 2))
    assert torch.equal(y[:, 24:], torch.zeros(1, 8, 2, 2))


def test_initialisation_is_that_of_the_official_code():
    model = create_model("resnet32")
    weight = model.stages[2][1].residual.conv1.weight
    deviation = math.sqrt(2 / (9 * 64))
    assert weight.abs().max() <= 2 * deviation
    # A normal cut at two deviations keeps 0.88 of its deviation.
    assert weight.std().item() == pytest.approx(0.8796 * deviation, rel=0.02)
    assert model.head.weight.abs().max() <= math.sqrt(3 / 64)
    assert torch.equal(model.head.bias, torch.zeros(10))


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (33, 7), (5, 5)])
def test_any_image_size(size):
    model = ResNet(num_blocks=(1, 1, 1), widths=(4, 4, 8, 16))
    assert model(torch.randn(2, 3, *size)).shape == (2, 10)
    assert model.forward_features(torch.randn(2, 3, *size)).shape == (2, 16, -(-size[0] // 4), -(-size[1] // 4))


@pytest.mark.parametrize(
    ("num_blocks", "widths", "message"),
    [
        ((), (16,), r"`num_blocks` \(=\(\)\) must name at least one stage"),
        ((1, 0), (4, 4, 4), r"`num_blocks\[1\]` \(=0\) must be a positive integer"),
        ((1, 1), (4, 4), r"`widths` \(=\(4, 4\)\) must have one width for the stem .* 3 in all"),
        ((1, 1), (4, 4, 2), r"`widths` \(=\(4, 4, 2\)\) must not shrink"),
    ],
)
def test_refuses(num_blocks, widths, message):
    with pytest.raises(ValueError, match=message):
        ResNet(num_blocks=num_blocks, widths=widths)
