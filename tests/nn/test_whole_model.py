import copy

import pytest
import torch
from torch import nn

from revnet import Additive, FixedPoint, ReversibleBlock, ReversibleSequential, create_model, set_coupling
from tests.helpers import mlp


def test_set_coupling_changes_every_block():
    model = nn.Sequential(
        nn.Linear(3, 4), ReversibleSequential(*[ReversibleBlock(mlp(2), mlp(2)) for _ in range(3)]), nn.Linear(4, 2)
    )
    set_coupling(model, FixedPoint(12))
    assert [block.coupling for block in model[1]] == [FixedPoint(12)] * 3
    assert "3 x ReversibleBlock(\n        coupling=FixedPoint(fraction_bits=12, is_wide=False)" in repr(model)
    assert [block.coupling for block in copy.deepcopy(model)[1]] == [FixedPoint(12)] * 3
    set_coupling(model, Additive())
    assert "coupling" not in repr(model)


def test_set_coupling_changes_published_networks():
    for name, num_blocks in (("revnet38", 2 + 2 + 3), ("revvit_cifar", 9)):
        model = create_model(name)
        set_coupling(model, FixedPoint())
        blocks = [module for module in model.modules() if isinstance(module, ReversibleBlock)]
        assert len(blocks) == num_blocks
        assert all(block.coupling == FixedPoint() for block in blocks)


def test_set_coupling_rejects_models_without_blocks():
    with pytest.raises(
        ValueError, match=r"`model` \(=Linear\) has no reversible block that could take the coupling Ad"
    ):
        set_coupling(nn.Linear(2, 2), Additive())
    with pytest.raises(TypeError, match=r"`coupling` \(='exact'\) must be a coupling, such as"):
        set_coupling(ReversibleBlock(mlp(2), mlp(2)), "exact")


def test_sequence_rejects_a_mix_of_exact_and_other_couplings():
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(2), mlp(2)) for _ in range(3)])
    sequence[1].coupling = FixedPoint()
    with pytest.raises(ValueError, match=r"`blocks.1.f` has the coupling FixedPoint\(.*, but `blocks.0.f` has Addi"):
        sequence(torch.randn(2, 4))
