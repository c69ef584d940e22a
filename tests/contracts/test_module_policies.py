"""Policies on modules of any kind behave as plain autograd does, or raise an error that names the cause."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet import (
    Checkpoint,
    Offload,
    PolicySequential,
    ReconstructionError,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
    Store,
    set_policy,
)
from revnet.engine._saved_samples import CHECKSUM_INTERVAL
from revnet.nn import add_policies
from tests.helpers import assert_close, gradients, stored_twin

every_policy = pytest.mark.parametrize(
    "policy", [Checkpoint(), Offload(), Store()], ids=["checkpoint", "offload", "store"]
)


def with_policy(model, policy, names="1"):
    """Return a copy of a model whose modules with these names have a policy."""
    model = copy.deepcopy(model)
    add_policies(model, names)
    set_policy(model, policy)
    return model


def assert_same(model, plain, x, steps=2):
    """Assert that gradients, buffers and parameters are equal in several steps."""
    for _ in range(steps):
        for module in (model, plain):
            module.zero_grad()
            torch.manual_seed(1)
            module(x).square().sum().backward()
        assert gradients(model).keys() == gradients(plain).keys()
        for actual, expected in zip(gradients(model).values(), gradients(plain).values(), strict=True):
            assert torch.equal(actual, expected)
        for actual, expected in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
            assert torch.equal(actual, expected)


# Arguments ------------------------------------------------------------------------------------------------------------


class Reversal(nn.Module):
    """Registers a hook on its argument in each run."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x):
        x.register_hook(lambda gradient: -0.5 * gradient)
        return self.f(x).tanh()


@every_policy
def test_a_hook_on_an_argument_runs_once(policy):
    plain = nn.Sequential(nn.Linear(4, 4), Reversal())
    assert_same(with_policy(plain, policy), plain, torch.randn(3, 4))


class DenseLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.f = nn.Linear(width, 4)

    def forward(self, features):
        return self.f(torch.cat(features, 1)).relu()


class DenseBlock(nn.Module):
    """Passes one list to all layers, and appends their outputs to it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([DenseLayer(8 + 4 * index) for index in range(3)])

    def forward(self, x):
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return torch.cat(features, 1)


@every_policy
def test_a_list_may_grow_after_it_was_passed(policy):
    plain = DenseBlock()
    assert_same(with_policy(plain, policy, "layers.*"), plain, torch.randn(6, 8))


class Appends(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x, outputs):
        outputs.append(self.f(x).tanh())
        return outputs[-1].sin()


@every_policy
def test_a_list_that_the_module_appends_to_grows_once(policy):
    model = with_policy(nn.ModuleList([Appends()]), policy, "0")
    outputs = []
    model[0](torch.randn(2, 4), outputs).sum().backward()
    assert len(outputs) == 1


class Compares(nn.Module):
    """Takes another path if both arguments are one tensor."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x, y):
        return self.f(x).tanh() if x is y else self.f(x).tanh() * self.f(y).sin()


@every_policy
@pytest.mark.parametrize("is_same", [True, False])
def test_one_tensor_for_two_arguments_is_one_tensor_again(policy, is_same):
    plain = nn.ModuleList([Compares()])
    model = with_policy(plain, policy, "0")
    x = torch.randn(3, 4)
    y = x if is_same else x.clone()
    results = []
    for module in (model, plain):
        leaves = [x.clone().requires_grad_()]
        leaves.append(leaves[0] if is_same else y.clone().requires_grad_())
        module[0](*leaves).sum().backward()
        results.append([leaf.grad for leaf in leaves] + list(gradients(module).values()))
    assert all(map(torch.equal, *results))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x, weight):
        return (self.f(x) * weight).tanh()


@every_policy
@pytest.mark.parametrize("kind", ["own", "own view", "foreign", "foreign view"])
def test_a_parameter_may_be_an_argument(policy, kind):
    plain = nn.ModuleList([Scaled()])
    results = []
    for module in (with_policy(plain, policy, "0"), plain):
        foreign = nn.Parameter(torch.ones(4, 4))
        weight = module[0].f.weight if "own" in kind else foreign
        module[0](torch.ones(4, 4), weight[0] if "view" in kind else weight).sum().backward()
        results.append([*gradients(module).values(), foreign.grad])
    for actual, expected in zip(*results, strict=True):
        assert actual is expected is None or torch.equal(actual, expected)


def test_the_flag_of_an_argument_may_change_before_the_backward_pass():
    plain = nn.ModuleList([Scaled()])
    results = []
    for module in (with_policy(plain, Checkpoint(), "0"), plain):
        weight = nn.Parameter(torch.ones(4))
        loss = module[0](torch.ones(3, 4), weight).sum()
        weight.requires_grad_(False)
        loss.backward()
        results.append(list(gradients(module).values()))
    assert all(map(torch.equal, *results))


@every_policy
def test_forward_passes_without_a_backward_pass_keep_nothing_alive(policy):
    """The output may become a part of the argument: then the argument leads back to the call."""
    model = with_policy(DenseBlock(), policy, "layers.*")
    inner = with_policy(nn.Sequential(nn.Sequential(nn.Tanh(), nn.Linear(8, 8))), policy, "0")
    alive = []
    for _ in range(3):
        alive.append(weakref.ref(model(torch.randn(2, 8))))
        if not isinstance(policy, Offload):
            x = torch.randn(2, 8) * 1
            x += inner(x)
            alive.append(weakref.ref(x))
            del x
    gc.collect()
    assert not any(reference() is not None for reference in alive)


# Buffers and parameters -----------------------------------------------------------------------------------------------


class WithoutCall(nn.Module):
    """Writes to the statistics of a batch norm without calling it."""

    def __init__(self, *, is_frozen=False):
        super().__init__()
        self.f, self.norm, self.is_frozen = nn.Linear(4, 4), nn.BatchNorm1d(4), is_frozen

    def train(self, mode=True):
        super().train(mode)
        if self.is_frozen:
            self.norm.eval()
        return self

    def forward(self, x):
        norm = self.norm
        halves = [
            F.batch_norm(half, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, 0.1)
            for half in self.f(x).chunk(2)
        ]
        return torch.cat(halves).tanh()


@every_policy
@pytest.mark.parametrize("is_frozen", [False, True], ids=["training", "frozen"])
def test_statistics_that_are_written_without_a_call_of_the_norm_are_written_once(policy, is_frozen):
    plain = nn.Sequential(nn.Linear(4, 4), WithoutCall(is_frozen=is_frozen).train())
    assert_same(with_policy(plain, policy), plain, torch.randn(8, 4), steps=4)


class Decays(nn.Module):
    """Counts its calls in a buffer, and writes to a parameter in every second one."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.count += 1
        if self.count % 2 == 0:
            self.f.weight.data.mul_(0.5)
        return self.f(x.tanh())


def test_a_write_that_the_first_call_did_not_make_raises():
    model = with_policy(nn.Sequential(nn.Linear(4, 4), Decays()), Checkpoint())
    x = torch.randn(3, 4)
    model(x).sum().backward()
    with pytest.raises(ReconstructionError, match=r"wrote to a parameter through `\.data`, and not in its first call"):
        model(x).sum().backward()


class Tied(nn.Module):
    """Writes to a parameter and to a buffer under one name, and reads them under another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.inner = nn.Linear(4, 4), nn.Linear(4, 4), nn.Module()
        self.b.weight = self.a.weight
        self.register_buffer("count", torch.zeros(()))
        self.inner.register_buffer("count", self.count)

    def forward(self, x):
        self.count.add_(1)
        self.a.weight.data.clamp_(-0.1, 0.1)
        return (self.b(self.a(x).relu()) * self.inner.count).tanh()


def test_a_tensor_in_two_places_is_one_tensor_in_a_replay():
    plain = nn.Sequential(nn.Linear(4, 4), Tied())
    model = with_policy(plain, Checkpoint())
    for _ in range(3):
        assert_same(model, plain, torch.randn(3, 4), steps=1)
        with torch.no_grad():
            for module in (model, plain):
                module[1].a.weight.mul_(3)


@pytest.mark.parametrize("make", [WithoutCall, Tied])
@pytest.mark.parametrize("policy", [Reverse(), Reverse(hold=True), Checkpoint()], ids=["reverse", "hold", "checkpoint"])
def test_buffers_of_residual_functions_are_written_once(make, policy):
    sequence = ReversibleSequential(*[ReversibleBlock(make(), make()) for _ in range(3)], policy=policy).double()
    twin = stored_twin(sequence)
    for _ in range(3):
        x = torch.randn(8, 8, dtype=torch.float64)
        for module in (sequence, twin):
            module.zero_grad()
            module(x).square().sum().backward()
        assert_close(gradients(sequence), gradients(twin))
        assert_close(sequence.state_dict(), twin.state_dict())


class Forgets(nn.Module):
    """Deletes a buffer in its first call."""

    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)
        self.register_buffer("flag", torch.ones(()))

    def forward(self, x):
        if "flag" in self._buffers:
            del self.flag
        return self.f(x).tanh()


def test_a_module_may_delete_a_buffer():
    plain = nn.Sequential(nn.Linear(4, 4), Forgets())
    assert_same(with_policy(plain, Checkpoint()), plain, torch.randn(3, 4))


def test_a_parameter_may_be_deleted_before_the_backward_pass():
    plain = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    model = with_policy(plain, Checkpoint())
    losses = [module(torch.ones(2, 4)).sum() for module in (model, plain)]
    kept = [module[1][0].bias for module in (model, plain)]
    for module, loss in zip((model, plain), losses, strict=True):
        del module[1][0].bias
        loss.backward()
        assert "bias" not in module[1][0]._parameters
    assert torch.equal(kept[0].grad, kept[1].grad)


# What is compared -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[nn.RReLU()], [nn.Dropout(), nn.RReLU()], [nn.Linear(8, 8), nn.RReLU()]])
def test_memory_that_an_operator_does_not_fill_is_not_compared(layers):
    """In evaluation, RReLU saves noise that it has not drawn."""
    model = nn.Sequential(nn.Linear(8, 8), PolicySequential(*layers, policy=Checkpoint())).eval()
    for _ in range(5):
        y = model(torch.randn(16, 8))
        others = [torch.randn(16, 8) for _ in range(9)]  # They overwrite freed memory.
        y.sum().backward()
        del others


class Counts(nn.Module):
    """Has a state in an attribute, and saves its input last."""

    def __init__(self):
        super().__init__()
        self.scale, self.num_calls = nn.Parameter(torch.ones(4)), 0

    def forward(self, x):
        self.num_calls += 1
        return (self.scale * self.num_calls).tanh() * x


def test_a_state_in_an_attribute_raises_even_if_the_input_is_saved_last():
    model = with_policy(nn.Sequential(nn.Linear(4, 4), Counts()), Checkpoint())
    with pytest.raises(ReconstructionError, match="returned different numbers when it ran again"):
        model(torch.randn(3, 4)).sum().backward()


def test_what_was_learned_in_training_and_in_evaluation_is_remembered(monkeypatch):
    reads = []
    monkeypatch.setattr("revnet.engine._states.checksum", reads.append)
    model = with_policy(nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3), nn.Tanh())), Checkpoint())
    for _ in range(CHECKSUM_INTERVAL):
        model.train()(torch.randn(2, 3))
        model.eval()(torch.randn(2, 3))
    assert len(reads) == 2 * 2 * 2  # In each mode, two parameters before and after the first call.
