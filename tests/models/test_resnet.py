import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet.models import ResNet
from revnet.models.resnet import BasicResidual, BottleneckResidual, MaxPool2dSame, PoolPadShortcut, projection_shortcut
from revnet.nn import Conv2dSame


def make(block, **options):
    with torch.device("meta"):
        return ResNet(num_blocks=(2, 3), widths=(16, 16, 32), block=block, **options)


def test_structure_of_basic_blocks():
    model = make("basic")
    assert [len(stage) for stage in model.stages] == [2, 3]
    (first, second), (down, after, _) = model.stages
    assert first.residual.norm1 is None, "the stem ends with norm and activation"
    assert second.residual.norm1 is not None
    assert down.residual.norm1.num_features == 16
    assert (down.residual.conv1.stride, down.residual.conv2.stride) == ((2, 2), (1, 1))
    assert (down.residual.conv1.in_channels, down.residual.conv1.out_channels) == (16, 32)
    assert down.shortcut.channel_padding == (8, 8)
    assert after.residual.conv1.stride == (1, 1)


def test_structure_of_bottlenecks():
    model = make("bottleneck")
    (first, second), (down, after, _) = model.stages
    assert first.residual.norm1 is None, "the stem ends with norm and activation"
    assert isinstance(second.shortcut, nn.Identity)
    assert isinstance(after.shortcut, nn.Identity)
    for block, stride, channels in ((first, 1, (16, 64)), (down, 2, (64, 128))):
        convs = (block.residual.conv1, block.residual.conv2, block.residual.conv3)
        assert [conv.kernel_size for conv in convs] == [(1, 1), (3, 3), (1, 1)]
        assert [conv.stride for conv in convs] == [(stride, stride), (1, 1), (1, 1)]
        inner = channels[1] // 4
        assert [conv.out_channels for conv in convs] == [inner, inner, channels[1]]
        project = block.shortcut
        assert (project.kernel_size, project.stride, project.bias) == ((1, 1), (stride, stride), None)
        assert (project.in_channels, project.out_channels) == channels


def test_structure_of_the_stems():
    small, large = make("basic"), make("basic", stem="large")
    for model, kernel_size, stride, pool in ((small, 3, 1, []), (large, 7, 2, [MaxPool2dSame])):
        conv, norm, relu, *rest = model.stem
        assert isinstance(conv, Conv2dSame)
        assert (conv.kernel_size, conv.stride) == ((kernel_size, kernel_size), (stride, stride))
        assert (norm.num_features, type(relu), [type(layer) for layer in rest]) == (16, nn.ReLU, pool)


def test_pool_pad_shortcut_pools_and_pads_both_sides():
    x = torch.randn(1, 16, 4, 4)
    y = PoolPadShortcut(16, 32, 2)(x)
    assert torch.equal(y[:, 8:24], F.avg_pool2d(x, 2))
    assert torch.equal(y[:, :8], torch.zeros(1, 8, 2, 2))
    assert torch.equal(y[:, 24:], torch.zeros(1, 8, 2, 2))


def test_pool_pad_shortcut_is_the_identity_if_the_shape_stays():
    x = torch.randn(1, 3, 4, 4)
    assert PoolPadShortcut(3, 3)(x) is x


def test_pads_an_odd_channel_at_the_end():
    assert PoolPadShortcut(3, 6).channel_padding == (1, 2)


@pytest.mark.parametrize(
    ("in_channels", "out_channels", "stride", "projects"),
    [(8, 8, 1, False), (8, 8, 2, True), (8, 16, 1, True), (16, 8, 1, True)],
)
def test_projection_if_the_shape_changes(in_channels, out_channels, stride, projects):
    shortcut = projection_shortcut(in_channels, out_channels, stride)
    assert isinstance(shortcut, Conv2dSame if projects else nn.Identity)
    assert shortcut(torch.randn(1, in_channels, 5, 4)).shape == (1, out_channels, -(-5 // stride), -(-4 // stride))


@pytest.mark.parametrize("residual", [BasicResidual, BottleneckResidual])
def test_a_residual_without_pre_activation_starts_with_its_convolution(residual):
    function = residual(4, 8, 2, pre_activate=False)
    seen = []
    function.conv1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 4, 6, 6)
    assert function(x).shape == (2, 8, 3, 3)
    assert seen[0] is x


@pytest.mark.parametrize("height", [1, 2, 3, 6, 7, 112])
@pytest.mark.parametrize("width", [1, 4, 5])
def test_max_pool_equals_tensorflow(height, width):
    """Even sides have one pixel of padding at the far end, odd sides one at each end."""
    x = -1 - torch.rand(2, 3, height, width)
    padded = F.pad(x, (width % 2, 1, height % 2, 1), value=-torch.inf)
    assert torch.equal(MaxPool2dSame()(x), F.max_pool2d(padded, 3, 2))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("size", [(32, 32), (8, 8), (33, 7), (5, 5)])
def test_any_image_size(block, size):
    def ceil(side, divisor):
        return -(-side // divisor)

    for stem, reduction in (("small", 4), ("large", 16)):
        model = ResNet(num_blocks=(1, 1, 1), widths=(4, 4, 8, 16), block=block, stem=stem)
        x = torch.randn(2, 3, *size)
        assert model(x).shape == (2, 10)
        assert model.forward_features(x).shape[2:] == (ceil(size[0], reduction), ceil(size[1], reduction))


def test_any_number_of_stages():
    model = ResNet(num_blocks=(1,) * 6, widths=(3, 3, 3, 5, 5, 7, 8), in_channels=2)
    assert model.forward_features(torch.randn(1, 2, 64, 64)).shape == (1, 8, 2, 2)
    assert ResNet(num_blocks=[2], widths=[4, 3], block="bottleneck")(torch.randn(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_blocks": (), "widths": (16,)}, ValueError, r"`num_blocks` \(=\(\)\) must have at least one stage"),
        ({"num_blocks": 3, "widths": (4, 4)}, TypeError, r"`num_blocks` \(=3\) must be a sequence of integers"),
        ({"num_blocks": (1,), "widths": "44"}, TypeError, r"`widths` \(='44'\) must be a sequence of integers"),
        (
            {"num_blocks": (1, 0), "widths": (4, 4, 4)},
            ValueError,
            r"`num_blocks\[1\]` \(=0\) must be a positive integer",
        ),
        ({"num_blocks": (1,), "widths": (4, -4)}, ValueError, r"`widths\[1\]` \(=-4\) must be a positive integer"),
        (
            {"num_blocks": (1, 1), "widths": (4, 4)},
            ValueError,
            r"`widths` \(=\(4, 4\)\) must have one width for the stem .* 3 in all",
        ),
        (
            {"num_blocks": (1, 1), "widths": (4, 4, 2)},
            ValueError,
            r"`widths` \(=\(4, 4, 2\)\) must not shrink: .* or use block='bottleneck'",
        ),
        (
            {"num_blocks": (1,), "widths": (4, 4), "block": "bottelneck"},
            ValueError,
            r"`block` \(='bottelneck'\) must be 'basic' or 'bottleneck'",
        ),
        (
            {"num_blocks": (1,), "widths": (4, 4), "stem": None},
            ValueError,
            r"`stem` \(=None\) must be 'small' or 'large'",
        ),
    ],
)
def test_rejects_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        ResNet(**options)
