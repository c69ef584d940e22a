"""Branches are compared with their block, without an effect that lasts."""

import random
import threading

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import revnet
from revnet.conversion import Consistent, set_method
from revnet.conversion._bodies import Branch
from revnet.memory import measure
from tests.conversion.hosts import Block, Host

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
BRANCHES = ["norm1 mixer", "norm2 mlp"]
WITH_DROPOUT = ["norm1 mixer dropout", "norm2 mlp"]
DIFFER = r"`branches` do not compute what `0` \(=.*\) computes"


def converted(block=Block, dropout=0.0, branches=BRANCHES):
    torch.manual_seed(0)
    host = Host(2, dropout=dropout, block=block)
    revnet.convert(host.blocks, Consistent(), branches=branches)
    return host


def test_branches_are_compared_in_each_mode():
    host = converted(dropout=0.5).eval()
    host(X)
    with pytest.raises(ValueError, match=DIFFER):
        host.train()(X)
    host.eval()(X)
    for block in host.blocks:
        block.dropout.train()
    with pytest.raises(ValueError, match=DIFFER):
        host(X)


class Scaling(nn.Linear):
    """A linear layer that takes an argument."""

    def forward(self, x, scale=None):
        y = super().forward(x)
        return y if scale is None else y * scale


class Masked(Block):
    """A block that passes its argument on under another name."""

    def __init__(self, width, dropout):
        super().__init__(width, dropout)
        self.mixer = Scaling(width, width)

    def forward(self, x, mask=None, factor=1.0, *, is_causal=True):
        x = x + factor * self.mixer(self.norm1(x), mask) * (1 if is_causal else 2)
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("mask", {"mask": torch.ones(())}),
        ("factor", {"factor": 0.5}),
        ("is_causal", {"is_causal": False}),
    ],
)
def test_an_argument_must_reach_a_branch(name, given):
    host = converted(Masked)
    host(X)
    x = host.stem(X)
    host.blocks[0](x, None, 1.0, is_causal=True)
    with pytest.raises(ValueError, match=rf"`branches` leave out the argument `{name}` \(=\w+\) of `0` \(=Masked\)"):
        host.blocks[0](x, **given)


class ZeroAtFirst(Block):
    def __init__(self, width, dropout):
        super().__init__(width, dropout)
        for layer in (self.mixer, self.mlp[0]):
            nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)


def test_residuals_that_start_as_zero_are_compared():
    with pytest.raises(ValueError, match=DIFFER):
        converted(ZeroAtFirst, dropout=0.5)(X)
    host = converted(ZeroAtFirst, dropout=0.5, branches=WITH_DROPOUT)
    host(X)
    assert not any(block.mixer.weight.any() for block in host.blocks)


def test_inputs_that_are_not_finite_are_not_compared():
    host = converted(branches=["norm1 mixer", "mlp"])
    set_method(host, Consistent(fraction_bits=None))
    assert host(X * torch.inf).isnan().all()
    with pytest.raises(ValueError, match=DIFFER):
        host(X)


class Widening(Block):
    def __init__(self, width, dropout):
        super().__init__(width, dropout)
        self.wide = nn.Linear(width, 2 * width)


def test_branches_must_keep_the_shape():
    with pytest.raises(
        ValueError, match=r"`branches` name \['wide'\], which change the shape .* \(6, 16\) to \(6, 32\)"
    ):
        converted(Widening, branches=["norm1 mixer", "wide"])(X)


class TuplesInEvaluation(Block):
    def forward(self, x, scale=None):
        y = super().forward(x)
        return y if self.training else (y, None)


def test_blocks_return_what_they_return_in_each_mode():
    block = converted(TuplesInEvaluation).blocks[0]
    x = torch.randn(6, 16)
    assert [type(block.train(is_train)(x)) for is_train in (True, False) * 2] == [torch.Tensor, tuple] * 2


class Times(nn.Module):
    def forward(self, x: torch.Tensor, scale: float):
        return x * scale


class Wrapper(nn.Module):
    """As PEFT has them."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    def forward(self, x, *args, **kwargs):
        return self.base_layer(x, *args, **kwargs)


class Compiled(nn.Module):
    """As `torch.compile` returns them: the class has no signature."""

    def __init__(self, layer):
        super().__init__()
        self._orig_mod = layer


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("wrap", [Wrapper, Compiled, torch.jit.script], ids=["wrapper", "compiled", "scripted"])
def test_wrapped_modules_get_the_arguments_that_they_know(wrap):
    block = Block()
    block.mixer, block.mlp = wrap(Times()), wrap(nn.Identity())
    mixer, mlp = (Branch(block, Block, "0", [name]) for name in ("mixer", "mlp"))
    assert [branch.takes(name) for branch in (mixer, mlp) for name in ("scale", "mask")] == [True, False, False, False]


class Noting(Block):
    """A block with state of every kind."""

    def __init__(self, width, dropout):
        super().__init__(width, dropout)
        self.norm1, self.lock = nn.BatchNorm1d(width), threading.Lock()
        self.maps, self.by_name, self.num_calls = [torch.ones(2, requires_grad=True) * 2], {"x": []}, 0
        self.mixer.register_forward_hook(lambda _, args, y: self.maps.append(y))

    def forward(self, x, scale=None):
        self.num_calls += random.randrange(1, 10)
        self.by_name["x"].append(x)
        return super().forward(x)


def test_a_comparison_changes_nothing():
    host = converted(Noting)
    before, state = [dict(vars(module)) for module in host.modules()], random.getstate()
    host(X)
    assert random.getstate() == state
    for block in host.blocks:
        counts = (len(block.maps), len(block.by_name["x"]), block.num_calls, int(block.norm1.num_batches_tracked))
        assert counts == (2, 0, 0, 1)  # Only the hook and the norm are part of the branches.
    after = [vars(module) for module in host.modules()]
    assert [list(attributes) for attributes in after] == [list(attributes) for attributes in before]
    assert all(one[name] is two[name] for one, two in zip(before, after, strict=True) for name in one)


def test_compares_under_computed_parameters_and_in_a_measurement():
    host = converted()
    parameters = {name: parameter * 2 for name, parameter in host.named_parameters()}
    assert not torch.equal(functional_call(host, parameters, X), host(X))
    host = converted()
    assert measure(host, X) == measure(host, X)


def test_a_comparison_leaves_no_parameters_without_a_graph_in_a_cache():
    host = converted()
    revnet.set_policy(host, "store")
    weight_norm(host.blocks[0].mixer)
    with parametrize.cached():
        host(X).sum().backward()
    assert all(parameter.grad is not None for parameter in host.blocks.parameters())


class UncopyableCache:
    def __deepcopy__(self, memo):
        raise NotImplementedError


class Cached(Block):
    def forward(self, x, cache=None):
        return super().forward(x)


class TakesCache(nn.Linear):
    def forward(self, x, cache):
        return super().forward(x)


def test_a_cache_that_cannot_be_copied():
    host = converted(Cached)
    for block in host.blocks:
        block.mixer = TakesCache(16, 16)
    with torch.no_grad(), pytest.raises(TypeError, match="a UncopyableCache cannot be copied, so `branches` cannot"):
        host.blocks[0](host.stem(X), UncopyableCache())
