import pytest
import torch
from torch import nn

from revnet import Reverse, Store, create_model
from revnet.memory import measure
from revnet.models import RevNet
from tests.helpers import assert_close


@pytest.mark.parametrize(("num_classes", "num_parameters"), [(10, 464_890), (100, 475_060)])
def test_parameters_are_those_of_the_official_code(num_classes, num_parameters):
    model = create_model("revnet38", num_classes=num_classes)
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters


def test_structure_is_that_of_the_official_code():
    model = create_model("revnet38")
    first = model.stages[0].reversible[0]
    assert first.f.norm1 is None, "the stem has just normalised and activated"
    assert first.g.norm1 is not None
    down = model.stages[2].downsample
    assert (down.f.conv1.stride, down.g.conv1.stride) == ((2, 2), (1, 1))
    assert (down.f.conv1.in_channels, down.f.conv1.out_channels) == (32, 56)
    assert down.shortcut.channel_padding == (12, 12)
    assert [len(stage.reversible) for stage in model.stages] == [3, 2, 2]
    assert all(conv.bias is None for conv in model.modules() if isinstance(conv, nn.Conv2d))


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (33, 7)])
def test_a_reversible_model_is_its_stored_twin(size):
    torch.manual_seed(3)
    model = create_model("revnet38", in_channels=1).double()
    torch.manual_seed(3)
    twin = create_model("revnet38", in_channels=1, policy=Store()).double()
    x = torch.randn(4, 1, *size, dtype=torch.float64)
    logits, expected = model(x), twin(x)
    assert torch.equal(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for (name, parameter), (twin_name, twin_parameter) in zip(
        model.named_parameters(), twin.named_parameters(), strict=True
    ):
        assert name == twin_name
        assert_close(parameter.grad, twin_parameter.grad)
    for buffer, twin_buffer in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, twin_buffer)


def test_depth_costs_no_memory():
    def peak(num_blocks, policy):
        model = RevNet(num_blocks=num_blocks, widths=(8, 8, 16), policy=policy)
        return measure(model, torch.randn(2, 3, 16, 16)).peak_bytes

    assert peak((4, 4), Reverse()) == peak((12, 12), Reverse())
    assert peak((4, 4), Store()) < peak((12, 12), Store())


def test_a_first_stage_that_widens_begins_with_a_stored_block():
    model = RevNet(num_blocks=(2,), widths=(4, 8))
    assert len(model.stages[0].reversible) == 1
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_odd_widths_are_refused():
    with pytest.raises(ValueError, match=r"`widths\[1\]` \(=7\) must be a multiple of 2, .*use 8"):
        RevNet(num_blocks=(1,), widths=(4, 7))
