import pytest
import torch
from torch import nn

from revnet import Checkpoint, Offload, PolicySequential


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
