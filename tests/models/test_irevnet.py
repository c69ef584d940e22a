import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet import Checkpoint, Store
from revnet.memory import measure
from revnet.models import IRevNet
from revnet.models.irevnet import irevnet301, irevnet_cifar
from tests.helpers import assert_close

OPTIONS = {"num_blocks": (3, 2, 2), "strides": (1, 2, 2), "hidden_widths": (4, 6, 8)}


def make(**options):
    """Return a network whose batch-norm statistics and scales differ from the initial ones."""
    model = IRevNet(**{**OPTIONS, **options})
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model


def num_parameters(make):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


def test_imagenet_network_has_the_published_size():
    """Blocks 6, 16, 72, 6, stream widths 24, 96, 384, 1536 and inner widths of a quarter, counted by hand."""
    total, before = 0, 6
    for stage, (num_blocks, width) in enumerate(zip((6, 16, 72, 6), (24, 96, 384, 1536), strict=True)):
        for block in range(num_blocks):
            hidden, entering = width // 4, before if block == 0 else width
            total += 9 * (entering * hidden + hidden**2 + hidden * width) + 2 * 2 * hidden
            total += (
                0 if stage == block == 0 else 2 * entering
            )  # the first function of the network has no norm before it
        before = width
    total += 2 * 2 * 1536 + (2 * 1536 + 1) * 1000
    assert num_parameters(irevnet301) == total == 125_120_356


def test_cifar_network():
    assert num_parameters(irevnet_cifar) == 2_590_642
    with torch.device("meta"):
        model = irevnet_cifar()
        assert model.forward_invertible(torch.empty(2, 3, 32, 32)).shape == (2, 192, 4, 4)


def by_hand(model, x):
    """Compute the published forward pass: each block swaps the streams and adds a residual to one."""

    def residual(function, x):
        layers = [layer for layer in function if not hasattr(layer, "block_size")]
        for layer in layers:
            x = layer(x)
        return x

    def halved(x):
        return torch.cat([x[..., row::2, column::2] for row in (0, 1) for column in (0, 1)], 1)

    x1, x2 = halved(x).chunk(2, 1)
    num_blocks = 0
    for stage in model.stages:
        for index, block in enumerate(stage.blocks):
            y = residual(block.f, x2)
            if index == 0 and stage.downsample.block_size == 2:
                x1, x2 = halved(x1), halved(x2)
            x1, x2 = x2, x1 + y
            num_blocks += 1
    if num_blocks % 2:
        x1, x2 = x2, x1  # this library does not swap the names
    return torch.cat((x1, x2), 1)


@pytest.mark.parametrize("training", [False, True])
def test_output_equals_the_published_computation(training):
    model = make().double().train(training)
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    y = by_hand(model, x)
    assert_close(model.forward_invertible(x), y, tolerance=1e-10)
    pooled = F.relu(model.norm(y)).mean((2, 3))
    assert_close(model(x), model.head(pooled), tolerance=1e-10)


@pytest.mark.parametrize("in_channels", [1, 3])
@pytest.mark.parametrize("policy", [None, Checkpoint(), Store()])
def test_inverse_restores_images(in_channels, policy):
    model = make(in_channels=in_channels, policy=policy).eval()
    x = torch.randn(2, in_channels, 16, 24)
    y = model.forward_invertible(x)
    assert y.numel() == x.numel()
    assert_close(model.inverse(y), x, tolerance=1e-3)  # roundings of float32
    model, x = model.double(), x.double()
    assert_close(model.inverse(model.forward_invertible(x)), x, tolerance=1e-11)


def test_is_a_bijection():
    """Any tensor of the right shape is the last map of some image."""
    model = make().double().eval()
    y = torch.randn(2, 192, 2, 3, dtype=torch.float64)
    assert_close(model.forward_invertible(model.inverse(y)), y, tolerance=1e-12)


def test_inverse_in_training_mode():
    model = make().double()
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    y = model.forward_invertible(x)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert_close(model.inverse(y), x, tolerance=1e-10)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_invertible_map_is_the_last_feature_map():
    model = make().eval()
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.forward_intermediates(x, [-1], intermediates_only=True)[0], model.forward_invertible(x))


def test_memory_is_flat_in_the_number_of_blocks():
    def activation_bytes(num_blocks, policy=None):
        model = IRevNet(num_blocks=num_blocks, strides=(1, 2), hidden_widths=(8, 8), policy=policy)
        return measure(model, torch.randn(2, 3, 16, 16)).activation_bytes

    assert activation_bytes((4, 4)) == activation_bytes((12, 8)) == activation_bytes((32, 16))
    assert activation_bytes((32, 16), Store()) > 8 * activation_bytes((32, 16))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_blocks": ()}, ValueError, r"`num_blocks` \(=\(\)\) must have at least one stage"),
        ({"strides": (1, 2)}, ValueError, r"`strides` \(=\(1, 2\)\) must have one entry .* 3 stages"),
        ({"strides": (1, 2, 4)}, ValueError, r"`strides\[2\]` \(=4\) must be 1, or 2 to halve"),
        ({"hidden_widths": (8,)}, ValueError, r"`hidden_widths` \(=\(8,\)\) must have one entry"),
        ({"num_blocks": (1, 0, 1)}, ValueError, r"`num_blocks\[1\]` \(=0\) must be a positive"),
        ({"num_blocks": 3}, TypeError, r"`num_blocks` \(=3\) must be a sequence"),
        ({"policy": "x"}, ValueError, "must be a policy"),
    ],
)
def test_rejects_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        IRevNet(**{**OPTIONS, **options})


def test_rejects_images_that_cannot_be_halved():
    with pytest.raises(ValueError, match=r"images of 12x18 cannot be halved .*multiples of 8, 16x24 for instance"):
        make()(torch.randn(2, 3, 12, 18))


@pytest.mark.parametrize("shape", [(2, 191, 2, 2), (192, 2, 2)])
def test_rejects_wrong_maps(shape):
    with pytest.raises(ValueError, match=r"`y` \(of shape .*\) must be \(B, 192, H, W\)"):
        make().inverse(torch.randn(shape))
