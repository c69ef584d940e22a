import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim import swa_utils

from revnet import Checkpoint, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.coupling import FixedPoint
from revnet.models import create_model
from revnet.nn import BatchNorm2dBiased, BatchNorm2dUnbiased
from tests.helpers import all_policies, assert_close, assert_same_buffers, gradients, stored_twin

both_norms = pytest.mark.parametrize("norm_type", [BatchNorm2dBiased, BatchNorm2dUnbiased])
EPS = torch.finfo(torch.float32).eps


def statistics(x, *, is_biased):
    """Return mean and variance of a batch in float64."""
    variance, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0 if is_biased else 1)
    return mean, variance


@both_norms
@pytest.mark.parametrize("momentum", [0.01, 0.1, 1.0])
def test_newest_batch_has_the_larger_of_both_weights(norm_type, momentum):
    """The weight shrinks to the momentum, and from then on, the decay is the official one."""
    norm = norm_type(3, momentum=momentum)
    expected = (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    for number in (*range(1, 101), *range(991, 1001)):
        norm.num_batches_tracked.fill_(number - 1)
        x = 3 * torch.randn(2, 3, 1 + number % 4, 5) + 1  # The factor between both variances varies.
        norm(x)
        weight = max(momentum, 10 / (number + 9))
        batch = statistics(x, is_biased=norm_type is BatchNorm2dBiased)
        expected = [(1 - weight) * old + weight * new for old, new in zip(expected, batch, strict=True)]
        # Rounding of the batch's statistics and of the average, and what is left of it from earlier batches.
        for average, value in zip((norm.running_mean, norm.running_var), expected, strict=True):
            torch.testing.assert_close(average.double(), value, rtol=0, atol=100 * EPS * 10)
    assert norm.num_batches_tracked == 1000


@both_norms
def test_first_batch_replaces_the_start(norm_type):
    """Later, the averages equal those of PyTorch, except for rounding."""
    norm = norm_type(3, momentum=0.01)
    usual = nn.BatchNorm2d(3, momentum=1.0)
    x = torch.randn(4, 3, 5, 5)
    norm(x), usual(x)
    factor = 1 - 1 / 100 if norm_type is BatchNorm2dBiased else 1
    assert torch.equal(norm.running_mean, usual.running_mean)
    assert torch.equal(norm.running_var, usual.running_var * factor)


def test_old_decay_from_batch_991_on():
    """From then on, PyTorch's own class computes the same averages."""
    norm, usual = BatchNorm2dUnbiased(3, momentum=0.01), nn.BatchNorm2d(3, momentum=0.01)
    norm.num_batches_tracked.fill_(990)
    for _ in range(20):
        x = 3 * torch.randn(4, 3, 5, 5) + 1
        norm(x), usual(x)
    for average, expected in ((norm.running_mean, usual.running_mean), (norm.running_var, usual.running_var)):
        # Three roundings in each batch.
        torch.testing.assert_close(average, expected, rtol=0, atol=20 * 3 * EPS * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_averages_in_other_dtypes(dtype):
    """A count that float16 cannot hold does not matter."""
    norm = BatchNorm2dBiased(3, momentum=0.01).to(dtype)
    norm.num_batches_tracked.fill_(100_000)
    x = torch.randn(4, 3, 5, 5, dtype=dtype)
    norm(x)
    mean, variance = statistics(x, is_biased=True)
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(norm.running_mean.double(), 0.01 * mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(norm.running_var.double(), 0.99 + 0.01 * variance, rtol=0, atol=tolerance)


@both_norms
def test_momentum_of_zero_leaves_the_averages_as_they_are(norm_type):
    norm = norm_type(3, momentum=0.0)
    norm(torch.randn(2, 3, 4, 4) + 5)
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert torch.equal(norm.running_var, torch.ones(3))
    assert norm.num_batches_tracked == 1


@both_norms
def test_empty_batch_leaves_the_averages_as_they_are(norm_type):
    norm = norm_type(3)
    norm(torch.randn(2, 3, 4, 4))
    before = norm.running_mean.clone(), norm.running_var.clone()
    norm(torch.randn(0, 3, 4, 4))
    assert torch.allclose(norm.running_mean, before[0])
    assert torch.allclose(norm.running_var, before[1])


@both_norms
def test_old_weights_keep_their_statistics(norm_type):
    """Weights without a count of batches are trained weights; their first batch must not replace the statistics."""
    state = nn.BatchNorm2d(3).state_dict()
    state["running_mean"].fill_(4)
    del state["num_batches_tracked"]
    norm = norm_type(3, momentum=0.01)
    norm.load_state_dict(dict(state))  # A plain dictionary has no version, as in a safetensors file.
    norm(torch.zeros(2, 3, 4, 4))
    torch.testing.assert_close(norm.running_mean, torch.full((3,), 3.96))
    with pytest.raises(RuntimeError, match="Missing key"):
        norm.load_state_dict(state)  # Its version says that a count belongs to it.


@both_norms
def test_state_dict_fits_batch_norm_of_pytorch(norm_type):
    norm, usual = norm_type(3), nn.BatchNorm2d(3)
    for _ in range(3):
        usual(torch.randn(2, 3, 4, 4))
    norm.load_state_dict(usual.state_dict())
    assert norm.num_batches_tracked == 3
    usual.load_state_dict(norm.state_dict())


@pytest.mark.parametrize("name", ["revnet38", "irevnet_cifar"])
def test_training_equals_training_with_batch_norm_of_pytorch(name):
    """Losses and weights are equal bit for bit; only the running statistics differ."""
    model = create_model(name, num_classes=10, in_channels=3)
    twin = copy.deepcopy(model)
    for parent in list(twin.modules()):
        for child, norm in list(parent.named_children()):
            if isinstance(norm, nn.BatchNorm2d):
                usual = nn.BatchNorm2d(norm.num_features, norm.eps, norm.momentum)
                usual.load_state_dict(norm.state_dict())
                setattr(parent, child, usual)
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (model, twin)]
    for _ in range(2):
        x, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
        losses = []
        for module, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(nn.functional.cross_entropy(module(x), labels))
            losses[-1].backward()
            optimizer.step()
        assert torch.equal(*losses)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", ["revnet38", "resnet32", "irevnet_cifar"])
def test_a_short_run_can_be_evaluated(name):
    """After one batch, evaluation normalizes that batch as training did."""
    model = create_model(name, num_classes=10, in_channels=3)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert all(type(norm) in (BatchNorm2dBiased, BatchNorm2dUnbiased) for norm in norms)
    x = torch.randn(8, 3, 32, 32)
    trained = model(x).detach()
    evaluated = model.eval()(x)
    # The variances of the batch are biased in training; in an i-RevNet they are unbiased in evaluation.
    assert (evaluated - trained).abs().max() < (1e-4 if name != "irevnet_cifar" else 0.1) * trained.abs().max()


@both_norms
@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_equal_batch_norm_of_pytorch(norm_type, training):
    norm, usual = norm_type(4, eps=1e-3), nn.BatchNorm2d(4, eps=1e-3)
    usual.load_state_dict(norm.state_dict())
    x = torch.randn(2, 4, 5, 5)
    results = []
    for module in (norm.train(training), usual.train(training)):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [leaf, *module.parameters()])])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@both_norms
def test_evaluation_does_not_change_the_statistics(norm_type):
    norm = norm_type(3).eval()
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
@both_norms
def test_rejects_wrong_options(norm_type, options, message):
    with pytest.raises(ValueError, match=message):
        norm_type(**{"num_features": 3, **options})


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


@all_policies
@pytest.mark.parametrize("momentum", [0.01, None])
def test_each_batch_counts_once_in_a_block_whose_functions_run_twice(policy, momentum):
    blocks = [ReversibleBlock(Residual(momentum), Residual(momentum)) for _ in range(4)]
    sequence = ReversibleSequential(*blocks, policy=policy).double()
    twin = stored_twin(sequence)
    for _ in range(2):
        x = torch.randn(4, 4, 5, 5, dtype=torch.float64)
        sequence(x).square().sum().backward()
        twin(x).square().sum().backward()
        assert_same_buffers(sequence, twin)
    assert all(count == 2 for name, count in sequence.named_buffers() if name.endswith("num_batches_tracked"))
    assert_close(gradients(sequence), gradients(twin))


def test_each_batch_counts_once_in_exact_reversal():
    blocks = [ReversibleBlock(Residual(0.01), Residual(0.01), coupling=FixedPoint()) for _ in range(3)]
    sequence = ReversibleSequential(*blocks)
    twin = stored_twin(sequence)
    for _ in range(2):
        x = torch.randn(4, 4, 5, 5)
        sequence(x).square().sum().backward()
        twin(x).square().sum().backward()
    assert_same_buffers(sequence, twin)
    assert sequence[0].f[0].num_batches_tracked == 2


def test_network_in_training_mode_compiles_as_one_graph():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2dBiased(4), nn.ReLU(), BatchNorm2dUnbiased(4, momentum=None))
    twin = copy.deepcopy(network)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(2, 3, 8, 8)
        y, expected = compiled(x), twin(x)
        assert torch.equal(y, expected)
        y.sum().backward()
    assert_same_buffers(network, twin)


@pytest.mark.parametrize("strict", [False, True])
def test_network_in_training_mode_can_be_exported(strict):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2dBiased(4), nn.ReLU(), BatchNorm2dUnbiased(4))
    x = torch.randn(2, 3, 8, 8)
    exported = torch.export.export(copy.deepcopy(network), (x,), strict=strict).module()
    for _ in range(2):
        assert torch.equal(exported(x), network(x))
    buffers = dict(exported.named_buffers())
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, buffers[name])


@both_norms
@pytest.mark.parametrize("track", [True, False])
def test_no_running_statistics_equals_batch_norm_of_pytorch(norm_type, track):
    """`torch.func.replace_all_batch_norm_modules_` and users remove the statistics."""
    norm, usual = norm_type(3), nn.BatchNorm2d(3, track_running_stats=False)
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


@both_norms
def test_copy_and_pickle_keep_the_options(norm_type):
    norm = norm_type(3, eps=1e-3, momentum=None)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert repr(other) == repr(norm)
        assert other.affine is True
        assert other.state_dict().keys() == nn.BatchNorm2d(3).state_dict().keys()
