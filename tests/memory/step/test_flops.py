import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet import create_model
from revnet.memory import count_flops


def test_a_multiply_add_counts_as_two():
    assert count_flops(nn.Linear(10, 20), torch.randn(3, 10)) == 2 * 3 * 10 * 20
    assert count_flops(nn.Conv2d(3, 4, 3, padding=1), torch.randn(1, 3, 8, 8)) == 2 * 9 * 3 * 4 * 64


def test_counts_without_computing():
    with torch.device("meta"):
        model, x = create_model("resnet32"), torch.empty(1, 3, 32, 32)
    flops = count_flops(model, x)
    assert flops == count_flops(create_model("resnet32"), torch.randn(1, 3, 32, 32))
    assert model.training


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_counts_as_two_products(device):
    """The CPU has its own kernel, without a formula in PyTorch."""

    class Attends(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    q, k, v = torch.ones(2, 3, 5, 8, device=device), *[torch.ones(2, 3, 7, 8, device=device) for _ in range(2)]
    assert count_flops(Attends(), q, k, v) == 2 * 2 * (2 * 3) * 5 * 7 * 8
