import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import swa_utils

from revnet import Checkpoint, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.nn import BatchNorm2dBiased, Conv2dSame
from tests.helpers import assert_close, assert_same_buffers, gradients, stored_twin


def test_running_statistics_are_moving_averages_of_mean_and_biased_variance():
    norm = BatchNorm2dBiased(3, momentum=0.01).double()
    mean, variance = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for size in (4, 2, 1):  # The factor between both variances differs from batch to batch.
        x = 3 * torch.randn(2, 3, size, 5, dtype=torch.float64) + 1
        norm(x)
        mean = 0.99 * mean + 0.01 * x.mean((0, 2, 3))
        variance = 0.99 * variance + 0.01 * x.var((0, 2, 3), correction=0)
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.num_batches_tracked == 3


@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_equal_batch_norm_of_pytorch(training):
    norm, usual = BatchNorm2dBiased(4, eps=1e-3), nn.BatchNorm2d(4, eps=1e-3)
    usual.load_state_dict(norm.state_dict())
    x = torch.randn(2, 4, 5, 5)
    results = []
    for module in (norm.train(training), usual.train(training)):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [leaf, *module.parameters()])])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_evaluation_does_not_change_the_statistics():
    norm = BatchNorm2dBiased(3).eval()
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    norm(torch.randn(2, 3, 4, 4))
    assert all(torch.equal(buffer, before[name]) for name, buffer in norm.named_buffers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": -0.1}, r"`momentum` \(=-0.1\) must be a number from 0 to 1"),
        ({"momentum": 1.5}, r"`momentum` \(=1.5\) must be a number from 0 to 1"),
        ({"momentum": "x"}, r"`momentum` \(='x'\) must be a number from 0 to 1"),
        ({"eps": -1e-3}, r"`eps` \(=-0.001\) must be a number, 0 or more"),
        ({"num_features": 0}, r"`num_features` \(=0\) must be a positive integer"),
    ],
)
def test_rejects_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        BatchNorm2dBiased(**{"num_features": 3, **options})


def test_no_momentum_weights_all_batches_equally():
    """The average is cumulative, as in `nn.BatchNorm2d`."""
    norm = BatchNorm2dBiased(3, momentum=None).double()
    batches = [torch.randn(2, 3, size, 5, dtype=torch.float64) for size in (4, 2, 1)]
    for x in batches:
        norm(x)
    means = torch.stack([x.mean((0, 2, 3)) for x in batches])
    variances = torch.stack([x.var((0, 2, 3), correction=0) for x in batches])
    torch.testing.assert_close(norm.running_mean, means.mean(0))
    torch.testing.assert_close(norm.running_var, variances.mean(0))


class Residual(nn.Sequential):
    def __init__(self, momentum):
        super().__init__(BatchNorm2dBiased(2, momentum=momentum), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1))


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint(), Store()])
def test_update_bn_estimates_the_statistics_again(policy):
    """`update_bn` sets `momentum` to None, also for a norm in a block whose functions run twice."""
    sequence = ReversibleSequential(*[ReversibleBlock(Residual(0.1), Residual(0.1)) for _ in range(2)], policy=policy)
    batches = [torch.randn(4, 4, 5, 5) for _ in range(3)]
    for x in batches:
        sequence(x).square().sum().backward()
    swa_utils.update_bn(batches, sequence)
    norm = sequence[0].f[0]
    assert norm.momentum == 0.1
    assert norm.num_batches_tracked == 3
    variances = torch.stack([x[:, 2:].var((0, 2, 3), correction=0) for x in batches])
    torch.testing.assert_close(norm.running_var, variances.mean(0))


def test_cumulative_average_counts_each_batch_once_in_a_reversed_block():
    sequence = ReversibleSequential(*[ReversibleBlock(Residual(None), Residual(None)) for _ in range(3)]).double()
    twin = stored_twin(sequence)
    for _ in range(2):
        x = torch.randn(4, 4, 5, 5, dtype=torch.float64)
        sequence(x).square().sum().backward()
        twin(x).square().sum().backward()
        assert_same_buffers(sequence, twin)
    assert_close(gradients(sequence), gradients(twin))


@pytest.mark.parametrize("strict", [False, True])
def test_network_in_training_mode_can_be_exported(strict):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2dBiased(4), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    exported = torch.export.export(copy.deepcopy(network), (x,), strict=strict).module()
    for _ in range(2):
        assert torch.equal(exported(x), network(x))
    buffers = dict(exported.named_buffers())
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, buffers[name])


@pytest.mark.parametrize("track", [True, False])
def test_no_running_statistics_equals_batch_norm_of_pytorch(track):
    """`torch.func.replace_all_batch_norm_modules_` and users remove the statistics."""
    norm, usual = BatchNorm2dBiased(3), nn.BatchNorm2d(3, track_running_stats=False)
    if track:
        torch.func.replace_all_batch_norm_modules_(norm)
    else:
        norm.track_running_stats = False
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(norm(x), usual(x))
    if not track:
        assert torch.equal(norm.running_var, torch.ones(3))


def test_conversion_to_synchronized_batch_norm_raises():
    """The conversion would lose the biased variance. The norm that the message names can be converted."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2dBiased(4))
    with pytest.raises(NotImplementedError, match=r"cannot become an `nn\.SyncBatchNorm`, which averages the unbiased"):
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    state = network[1].state_dict()
    network[1] = nn.BatchNorm2d(4)
    network[1].load_state_dict(state)
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(network)[1], nn.SyncBatchNorm)


def test_copy_and_pickle_keep_the_options():
    norm = BatchNorm2dBiased(3, eps=1e-3, momentum=None)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert repr(other) == repr(norm)
        assert other.affine is True
        assert other.state_dict().keys() == nn.BatchNorm2d(3).state_dict().keys()


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
