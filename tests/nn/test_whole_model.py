import copy

import pytest
import torch
from torch import nn

from revnet import (
    Additive,
    Checkpoint,
    FixedPoint,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
    Store,
    create_model,
    set_coupling,
    set_policy,
)
from revnet.nn._whole_model import policy_holders
from tests.helpers import mlp
from tests.nn.samples import make_model, policies


def test_policy_holders_returns_modules_and_units_by_name():
    model = make_model()
    holders = policy_holders(model)
    assert list(holders) == ["0", "1"]
    assert [unit.name for unit in holders["1"].policy_units] == ["blocks.0", "blocks.1", "blocks.2"]
    assert holders["1"].policy_units[2].functions == (model[1][2].f, model[1][2].g)
    assert [unit.name for unit in holders["0"].policy_units] == [""]
    assert holders["0"].policy_units[0].functions == (model[0],)


def test_set_policy_changes_every_unit_that_accepts_the_policy():
    model = make_model()
    set_policy(model, Checkpoint())
    assert policies(model) == {"0": (Checkpoint(),), "1": (Checkpoint(),) * 3}
    set_policy(model, Reverse())
    assert policies(model) == {"0": (Checkpoint(),), "1": (Reverse(),) * 3}


def test_published_networks_have_the_expected_units():
    for name, num_units in (("revnet38", 1 + 3 + 3 + 3), ("resnet32", 1 + 15)):
        model = create_model(name)
        set_policy(model, Store())
        assert sum(len(holder.policy_units) for holder in policy_holders(model).values()) == num_units


@pytest.mark.parametrize(
    ("model", "policy", "error", "message"),
    [
        (nn.Linear(2, 2), Store(), ValueError, r"`model` \(=Linear\) has no unit that accepts the policy Store\(\)"),
        (create_model("resnet32"), Reverse(), ValueError, r"`model` \(=ResNet\) has no unit that accepts the policy"),
        (
            make_model(),
            "Store",
            ValueError,
            r"`policy` \(='Store'\) must be a policy: .* in lower case, such as 'store'",
        ),
        (make_model(), 3, TypeError, r"`policy` \(=3\) must be a policy"),
        (3, Store(), TypeError, r"`model` \(=3\) must be an nn.Module"),
    ],
)
def test_set_policy_rejects(model, policy, error, message):
    with pytest.raises(error, match=message):
        set_policy(model, policy)


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


@pytest.mark.parametrize(
    "couplings", [(Additive(), FixedPoint()), (FixedPoint(), Additive()), (FixedPoint(14), FixedPoint(10))]
)
def test_block_rejects_couplings_of_two_grids(couplings):
    block = ReversibleBlock(mlp(2), mlp(2), coupling=couplings)
    for run in (block, block.inverse):
        with pytest.raises(ValueError, match=r"`g` has the coupling .*, but `f` has .* give all functions of a block"):
            run(torch.randn(2, 4))
