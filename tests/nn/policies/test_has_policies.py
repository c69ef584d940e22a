import pytest
import torch
from torch import nn

from revnet import (
    Checkpoint,
    Offload,
    PolicySequential,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
    Store,
    create_model,
    set_policy,
)
from revnet.nn import InvertibleSequential, as_policy, policy_holders
from revnet.nn._restore import restoring_policies
from tests.helpers import mlp


def make_model():
    return nn.Sequential(
        PolicySequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()),
        ReversibleSequential(*[ReversibleBlock(mlp(2), mlp(2)) for _ in range(3)]),
        nn.Linear(4, 2),
    )


def policies(model):
    return {name: holder.policies for name, holder in policy_holders(model).items()}


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


POLICIES = {"reverse": Reverse(), "checkpoint": Checkpoint(), "offload": Offload(), "store": Store()}


@pytest.mark.parametrize(("name", "policy"), POLICIES.items())
def test_policies_can_be_given_by_name(name, policy):
    blocks = [ReversibleBlock(mlp(2), mlp(2)) for _ in range(2)]
    assert as_policy(name) == as_policy(policy) == policy
    assert ReversibleSequential(*blocks, policy=name).policies == (policy,) * 2
    assert ReversibleSequential(*blocks, policy=[name, Store()]).policies == (policy, Store())
    assert InvertibleSequential(*blocks, policy=name).layers[0].policies == (policy,) * 2
    if name != "reverse":
        assert PolicySequential(nn.ReLU(), policy=name).policies == (policy,)
    model = make_model()
    set_policy(model, name)
    assert policies(model)["1"] == (policy,) * 3
    for model_name in ("revnet38", "irevnet_cifar", "revvit_cifar"):
        model = create_model(model_name, policy=name)
        assert {each for holder in reversible_holders(model) for each in holder.policies} == {policy}


def reversible_holders(model):
    return [holder for holder in policy_holders(model).values() if holder.policy_units[0].is_reversible]


def test_error_message_lists_all_policies():
    with pytest.raises(TypeError) as error:
        as_policy(None, "policies[3]")
    assert str(error.value).startswith("`policies[3]` (=None) must be")
    assert all(f"`{policy}`" in str(error.value) for policy in POLICIES.values())


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


def test_unit_rejects_a_policy_that_it_does_not_accept():
    with pytest.raises(
        TypeError, match=r"`policy` \(=Reverse\(\)\) is for reversible blocks, and this module is not reversible"
    ):
        PolicySequential(nn.ReLU(), policy=Reverse())
    with pytest.raises(TypeError, match=r"`policy` \(=None\) must be a policy"):
        PolicySequential(nn.ReLU(), policy=None)
    with pytest.raises(TypeError, match=r"`policy\[1\]` \(=3\) must be a policy"):
        make_model()[1].set_policies([Store(), 3, Store()])
    with pytest.raises(ValueError, match=r"`len\(policy\)` \(=2\) must be the number of units, 3"):
        make_model()[1].set_policies([Store(), Store()])


def test_policies_are_restored_after_an_error():
    model = make_model()
    before = policies(model)
    with pytest.raises(ValueError, match="has no unit that accepts"), restoring_policies(model):
        set_policy(model, Offload()) or set_policy(model[2], Offload())
    assert policies(model) == before


@pytest.mark.parametrize("policy", [Checkpoint(), Offload()])
def test_policy_sequential_trains_like_a_plain_sequential(policy):
    layers = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 4)]
    plain = nn.Sequential(*layers)
    x = torch.randn(8, 3)
    torch.manual_seed(1)
    plain(x).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in plain.parameters()], layers[1].running_mean.clone()
    plain.zero_grad()
    layers[1].reset_running_stats()
    torch.manual_seed(1)
    module = PolicySequential(*layers, policy=policy)
    assert list(module.state_dict()) == list(plain.state_dict())
    module(x).square().sum().backward()
    assert torch.equal(layers[1].running_mean, expected[1])
    assert layers[1].num_batches_tracked == 1
    for parameter, gradient in zip(module.parameters(), expected[0], strict=True):
        assert torch.equal(parameter.grad, gradient)


def test_policy_sequential_can_be_sliced_and_shows_its_policy():
    module = PolicySequential(nn.Linear(3, 4), nn.ReLU(), policy=Checkpoint())
    assert len(module[:1]) == 1
    assert "policy=Checkpoint()" in repr(module)
    assert "policy" not in repr(PolicySequential(nn.ReLU()))
