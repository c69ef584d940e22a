import pytest
from torch import nn

from revnet import Offload, PolicySequential, Store, set_policy
from revnet.nn._restore import restoring_policies
from revnet.nn._whole_model import policy_holders


def fail_with_other_policies(model):
    with restoring_policies(model):
        set_policy(model, Offload())
        raise ZeroDivisionError


def test_policies_are_restored_after_an_error():
    model = nn.Sequential(PolicySequential(nn.Linear(3, 4)), nn.Linear(4, 2))
    with pytest.raises(ZeroDivisionError):
        fail_with_other_policies(model)
    assert [holder.policies for holder in policy_holders(model).values()] == [(Store(),)]
