import pytest
import torch
from torch import nn

from revnet.nn import BatchNorm2dBiased


def test_running_statistics_are_moving_averages_of_mean_and_biased_variance():
    norm = BatchNorm2dBiased(3, momentum=0.01).double()
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for size in (4, 2, 1):  # the share to be taken away differs from batch to batch
        x = 3 * torch.randn(2, 3, size, 5, dtype=torch.float64) + 1
        norm(x)
        mean = 0.99 * mean + 0.01 * x.mean((0, 2, 3))
        variance = 0.99 * variance + 0.01 * x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_are_pytorchs(training):
    norm, usual = BatchNorm2dBiased(4, eps=1e-3), nn.BatchNorm2d(4, eps=1e-3)
    usual.load_state_dict(norm.state_dict())
    x = torch.randn(2, 4, 5, 5)
    results = []
    for module in (norm.train(training), usual.train(training)):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [leaf, *module.parameters()])])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_evaluation_leaves_the_statistics_alone():
    norm = BatchNorm2dBiased(3).eval()
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    norm(torch.randn(2, 3, 4, 4))
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())


@pytest.mark.parametrize("momentum", [None, -0.1, 1.5])
def test_momentum(momentum):
    with pytest.raises(ValueError, match=rf"`momentum` \(={momentum}\) must be a number from 0 to 1"):
        BatchNorm2dBiased(3, momentum=momentum)
