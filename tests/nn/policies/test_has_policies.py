import pytest
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
from revnet.nn import InvertibleSequential
from revnet.nn._whole_model import policy_holders
from revnet.nn.policies._has_policies import as_policy
from tests.helpers import mlp
from tests.nn.samples import make_model, policies

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
        assert {unit_policy for holder in reversible_holders(model) for unit_policy in holder.policies} == {policy}


def reversible_holders(model):
    return [holder for holder in policy_holders(model).values() if holder.policy_units[0].is_reversible]


def test_error_message_lists_all_policies():
    with pytest.raises(TypeError) as error:
        as_policy(None, "policies[3]")
    assert str(error.value).startswith("`policies[3]` (=None) must be")
    assert all(f"`{policy}`" in str(error.value) for policy in POLICIES.values())


def test_unit_rejects_a_policy_that_it_does_not_accept():
    with pytest.raises(
        TypeError, match=r"`policy` \(=Reverse\(\)\) is for reversible blocks, and this module is not reversible"
    ):
        PolicySequential(nn.ReLU(), policy=Reverse())
    with pytest.raises(TypeError, match=r"`policy` \(=None\) must be a policy"):
        PolicySequential(nn.ReLU(), policy=None)
    with pytest.raises(TypeError, match=r"`policy\[1\]` \(=3\) must be a policy"):
        make_model()[1].set_policies([Store(), 3, Store()])
    with pytest.raises(ValueError, match=r"`policy` \(of length 2\) must have one entry for each unit \(3\)"):
        make_model()[1].set_policies([Store(), Store()])
