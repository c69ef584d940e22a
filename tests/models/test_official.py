"""Comparison of every published network with the official code: parameter counts and outputs."""

import pytest
import torch
from torch import nn

from revnet import create_model, list_models
from revnet.models import ResNet, RevNet
from tests.models.official import CONFIGS, Config, Official

NUM_PARAMETERS = {
    ("resnet32", 10): 464_154,
    ("resnet32", 100): 470_004,
    ("revnet38", 10): 464_890,
    ("revnet38", 100): 475_060,
    ("resnet110", 10): 1_727_962,
    ("resnet110", 100): 1_733_812,
    ("revnet110", 10): 1_729_194,
    ("revnet110", 100): 1_740_804,
    ("resnet164", 10): 1_703_258,
    ("resnet164", 100): 1_726_388,
    ("revnet164", 10): 1_748_778,
    ("revnet164", 100): 1_794_948,
    ("resnet50", 1000): 25_549_352,
    ("revnet56", 1000): 27_553_128,
    ("resnet101", 1000): 44_541_480,
    ("revnet104", 1000): 45_428_072,
}


@pytest.mark.parametrize(("name", "num_classes"), NUM_PARAMETERS)
def test_parameter_counts_equal_the_official_code(name, num_classes):
    with torch.device("meta"):
        model = create_model(name, num_classes=num_classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == NUM_PARAMETERS[name, num_classes]


def assert_is_official(config: Config, model: nn.Module, x: torch.Tensor) -> None:
    """Check that logits in training mode and moving averages after one batch equal the official code.

    The averages are the official ones from batch 991 on; before, they cover fewer batches.
    """
    # Random values, since swapped batch norms would be equal with ones and zeros.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.num_batches_tracked.fill_(990)
    official = Official(config, model)
    expected = official.logits(x)
    assert official.parameters == []
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    for norm, (mean, variance) in zip(norms, official.moments, strict=True):
        torch.testing.assert_close(norm.running_mean, 0.01 * mean, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(norm.running_var, 0.99 + 0.01 * variance, rtol=1e-9, atol=1e-9)


def test_every_network_has_a_configuration():
    assert sorted(CONFIGS) == sorted(name for name in list_models() if name.startswith(("resnet", "revnet")))


@pytest.mark.parametrize("name", ["resnet32", "revnet38", "resnet164", "revnet164"])
def test_output_equals_the_official_code(name):
    assert_is_official(CONFIGS[name], create_model(name).double(), torch.randn(2, 3, 16, 16, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_output_equals_the_official_code_at_any_size(name):
    assert_is_official(CONFIGS[name], create_model(name).double(), torch.randn(2, 3, 64, 64, dtype=torch.float64))


LARGE = {"init_filter": 7, "init_stride": 2, "init_max_pool": True}


@pytest.mark.parametrize("use_bottleneck", [False, True])
@pytest.mark.parametrize("reversible", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_large_stem_equals_the_official_code(use_bottleneck, reversible, size):
    config = Config((1, 2), (8, 12, 16), reversible, use_bottleneck, **LARGE)
    model = (RevNet if reversible else ResNet)(
        num_blocks=config.num_residual_units,
        widths=config.filters,
        block="bottleneck" if use_bottleneck else "basic",
        stem="large",
    )
    assert_is_official(config, model.double(), torch.randn(2, 3, *size, dtype=torch.float64))


def test_no_projection_if_the_shape_stays():
    """If the first stage is as wide as the stem, the official code projects only in later stages."""
    for reversible in (False, True):
        config = Config((2, 2), (16, 4, 4), reversible, use_bottleneck=True)
        model = (RevNet if reversible else ResNet)(num_blocks=(2, 2), widths=(16, 4, 4), block="bottleneck")
        assert_is_official(config, model.double(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
