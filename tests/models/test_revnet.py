import pytest
import torch
from torch import nn

from revnet import ReconstructionWarning, Reverse, Store, create_model, list_models
from revnet.memory import measure
from revnet.models import RevNet, published_image_size
from revnet.models.resnet import BLOCK_KINDS
from revnet.models.revnet import Downsample
from tests.helpers import assert_close, assert_same_buffers, gradients, squares

BLOCKS = ("basic", "bottleneck")


def make_with_twin(make_model, **options):
    """Return a reversible model and its stored twin, with the same weights, in float64."""
    model = make_model(**options).double()
    twin = make_model(policy=Store(), **options).double()
    twin.load_state_dict(model.state_dict())
    return model, twin


def test_structure_of_basic_blocks():
    with torch.device("meta"):
        model = create_model("revnet38")
    first = model.stages[0].reversible[0]
    assert first.f.norm1 is None, "the stem ends with norm and activation"
    assert first.g.norm1 is not None
    down = model.stages[2].downsample
    assert (down.f.conv1.stride, down.g.conv1.stride) == ((2, 2), (1, 1))
    assert (down.f.conv1.in_channels, down.f.conv1.out_channels) == (32, 56)
    assert down.shortcut1.channel_padding == down.shortcut2.channel_padding == (12, 12)
    assert [len(stage.reversible) for stage in model.stages] == [3, 2, 2]
    assert all(conv.bias is None for conv in model.modules() if isinstance(conv, nn.Conv2d))


def test_structure_of_bottlenecks():
    with torch.device("meta"):
        model = create_model("revnet104")
    assert [len(stage.reversible) for stage in model.stages] == [1, 1, 10, 1]
    streams = [64, 256, 512, 1024, 1664]
    for index, stage in enumerate(model.stages):
        down, stride = stage.downsample, 2 if index else 1
        for project in (down.shortcut1, down.shortcut2):
            assert (project.in_channels, project.out_channels) == (streams[index], streams[index + 1])
            assert (project.kernel_size, project.stride, project.bias) == ((1, 1), (stride, stride), None)
        assert (down.f.conv1.stride, down.f.conv2.stride, down.g.conv1.stride) == ((stride,) * 2, (1, 1), (1, 1))
        assert down.f.conv2.in_channels == down.g.conv2.in_channels == streams[index + 1] // 4
        assert (down.f.norm1 is None) == (index == 0), "the stem ends with norm and activation"
        assert down.g.norm1 is not None
        assert all(block.f.norm1 is not None for block in stage.reversible)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("size", [(32, 32), (8, 8), (33, 7)])
def test_equals_the_stored_twin(block, size):
    for stem in ("small", "large"):
        model, twin = make_with_twin(
            RevNet, num_blocks=(2, 2), widths=(8, 8, 12), block=block, stem=stem, in_channels=1
        )
        x = torch.randn(4, 1, *size, dtype=torch.float64)
        logits, expected = model(x), twin(x)
        assert torch.equal(logits, expected)
        squares(logits).backward()
        squares(expected).backward()
        assert_close(gradients(model), gradients(twin))
        assert_same_buffers(model, twin)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in list_models() if name.startswith("revnet")])
def test_step_of_a_published_network_equals_the_twin(name):
    model, twin = make_with_twin(lambda **options: create_model(name, **options))
    size = min(published_image_size(name), 64)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    for module in (model, twin):
        module(x).logsumexp(1).sum().backward()
    assert_close(gradients(model), gradients(twin), tolerance=1e-7)
    assert_same_buffers(model, twin)


@pytest.mark.parametrize("block", BLOCKS)
def test_memory_is_flat_in_depth(block):
    def peak(num_blocks, policy):
        model = RevNet(num_blocks=num_blocks, widths=(8, 8, 16), block=block, policy=policy)
        return measure(model, torch.randn(2, 3, 16, 16)).activation_bytes

    assert peak((4, 4), Reverse()) == peak((9, 12), Reverse())
    assert peak((4, 4), Store()) < peak((9, 12), Store())


class OnPair(nn.Module):
    """A block as a module of two tensors, for `measure`."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x1, x2):
        return self.block((x1, x2))


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("stride", [1, 2])
def test_first_block_of_a_stage_stores_input_and_one_stream(block, stride):
    downsample = Downsample(8, 16, stride, kind=BLOCK_KINDS[block], policy=Reverse())
    x = [torch.randn(2, 8, 16, 16, requires_grad=True) for _ in range(2)]
    stream_bytes = 2 * 16 * (16 // stride) ** 2 * 4
    loss_bytes = 2 * 4
    assert measure(OnPair(downsample), *x).held_bytes == stream_bytes + loss_bytes


@pytest.mark.parametrize("block", BLOCKS)
def test_streams_are_float32_under_autocast(block):
    """In bfloat16 the rebuilt streams would be inaccurate, and so would the gradients."""
    model = RevNet(num_blocks=(2, 2), widths=(8, 8, 12), block=block)
    twin = RevNet(num_blocks=(2, 2), widths=(8, 8, 12), block=block, policy=Store())
    twin.load_state_dict(model.state_dict())
    dtypes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, y: dtypes.extend(stream.dtype for stream in y))
    x = torch.randn(4, 3, 16, 16)
    for module in (model, twin):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            module(x).float().logsumexp(1).sum().backward()
    assert dtypes == [torch.float32] * 4
    # The residual functions round their input to 8 bits, so they rarely see the rounding of float32.
    for (name, gradient), expected in zip(gradients(model).items(), gradients(twin).values(), strict=True):
        assert (gradient - expected).norm() <= 0.01 * expected.norm(), name


def test_bfloat16_model_has_bfloat16_streams_and_warns():
    model = RevNet(num_blocks=(1, 2), widths=(4, 4, 8), block="bottleneck").bfloat16()
    with pytest.warns(
        ReconstructionWarning, match="the streams that begin at `blocks.0.f` are torch.bfloat16, so undoing"
    ):
        y = model(torch.randn(2, 3, 8, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16


def test_first_stage_that_widens_starts_with_a_downsample():
    model = RevNet(num_blocks=(2,), widths=(4, 8))
    assert len(model.stages[0].reversible) == 1
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_first_stage_of_equal_width_is_reversible():
    model, twin = make_with_twin(RevNet, num_blocks=(2, 1), widths=(16, 4, 4), block="bottleneck")
    assert len(model.stages[0].reversible) == 2
    assert model.stages[0].reversible[0].f.norm1 is None
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    squares(model(x)).backward()
    squares(twin(x)).backward()
    assert_close(gradients(model), gradients(twin))


def test_bottleneck_stage_may_be_narrower():
    model, twin = make_with_twin(RevNet, num_blocks=(1, 2), widths=(4, 8, 4), block="bottleneck")
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize("block", BLOCKS)
def test_rejects_odd_widths(block):
    with pytest.raises(ValueError, match=r"`widths\[1\]` \(=7\) must be a multiple of 2, .*use 8"):
        RevNet(num_blocks=(1,), widths=(4, 7), block=block)


@pytest.mark.parametrize("policy", [3, Store, [Reverse()]])
def test_rejects_wrong_policies(policy):
    with pytest.raises(
        TypeError, match=r"`policy` \(=.*\) must be a policy: `Reverse\(\)`, `Checkpoint\(\)`, .*`Store\(\)`"
    ):
        create_model("revnet38", policy=policy)


def test_resnet_has_no_policy():
    with pytest.raises(TypeError, match="policy"):
        create_model("resnet32", policy=Store())
