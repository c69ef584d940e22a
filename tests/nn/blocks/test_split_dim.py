"""The dimension along which blocks split. A three-dimensional input requires that it is given."""

import pytest
import torch
from torch import nn

from revnet import ReversibleBlock
from revnet.nn import CouplingLayer, MomentumBlock, MultiStreamBlock

MAKERS = {
    "block": lambda **options: ReversibleBlock(nn.Identity(), nn.Identity(), **options),
    "layer": lambda **options: CouplingLayer(nn.Identity(), **options),
    "streams": lambda **options: MultiStreamBlock(nn.Identity(), nn.Identity(), nn.Identity(), **options),
    "momentum": lambda **options: MomentumBlock(nn.Identity(), **options),
}
all_makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


@all_makers
def test_three_dimensional_input_needs_a_split_dim(make):
    """Splitting (B, T, D) along 1 would mix tokens, and splitting (B, C, L) along -1 would mix positions."""
    block, x = make(), torch.randn(2, 6, 12)
    assert block.split_dim == 1
    with pytest.raises(
        ValueError,
        match=r"^`split_dim` must be passed to \w+ for a three-dimensional input \(shape \(2, 6, 12\)\); pass",
    ) as error:
        block(x)
    assert "`split_dim=-1` for (B, T, D), or `split_dim=1` for (B, C, L)" in str(error.value)
    for chosen in (1, -1, 2):
        assert make(split_dim=chosen).split_dim == chosen
        make(split_dim=chosen)(x)


@all_makers
@pytest.mark.parametrize("shape", [(4, 6), (2, 6, 4, 4), (2, 6, 4, 4, 4)])
def test_other_inputs_split_along_the_channels(make, shape):
    x, block = torch.randn(shape), make()
    block(x)
    block((x,) * block.num_streams)
    block((torch.randn(2, 6, 12),) * block.num_streams)  # The pair is already split.


@all_makers
@pytest.mark.parametrize("split_dim", ["x", 1.0, True, nn.ReLU()])
def test_split_dim_is_an_integer(make, split_dim):
    with pytest.raises(TypeError, match=r"`split_dim` \(=.*\) must be an integer, the dimension of the input to split"):
        make(split_dim=split_dim)


@all_makers
def test_repr_shows_a_given_split_dim(make):
    assert "split_dim" not in repr(make())
    assert "split_dim=1" in repr(make(split_dim=1))
