import pytest
import torch
import torch.nn.functional as F

from revnet.nn import Conv2dSame


@pytest.mark.parametrize("size", [1, 5, 8, 9])
@pytest.mark.parametrize("kernel_size", [1, 3, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_conv_output_size_is_rounded_up(size, kernel_size, stride):
    y = Conv2dSame(1, 1, kernel_size, stride)(torch.randn(1, 1, size, size))
    assert y.shape[-2:] == (-(-size // stride), -(-size // stride))


def test_conv_with_stride_two_pads_right_and_bottom():
    conv = Conv2dSame(1, 1, 3, 2)
    x = torch.randn(1, 1, 8, 8)
    assert torch.equal(conv(x), F.conv2d(F.pad(x, (0, 1, 0, 1)), conv.weight, stride=2))
    odd = torch.randn(1, 1, 7, 7)
    assert torch.equal(conv(odd), F.conv2d(F.pad(odd, (1, 1, 1, 1)), conv.weight, stride=2))


def test_conv_with_stride_one_pads_all_sides():
    conv = Conv2dSame(2, 3, 3)
    x = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, padding=1))
