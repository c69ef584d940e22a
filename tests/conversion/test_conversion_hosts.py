"""A host may use converted blocks in any way that reversal can follow, and is refused in one line otherwise."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import revnet
from revnet import Checkpoint, PolicySequential, Reverse, Store, set_policy
from revnet.conversion import BDIA, Adapter, Consistent, Dr2Net, Rewire, set_method
from revnet.conversion._stream_state import state_of
from revnet.errors import ReconstructionError
from revnet.nn import HasGradientCheckpointing
from tests.conversion.hosts import Block, Host, all_equal, gradients, twins

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))


def interleaved(model):
    first, second = model.stem(X), model.stem(X * 2)
    for block in model.blocks:
        first, second = block(first), block(second)
    model.head(first * second).sum().backward()


def features(model):
    x, total = model.stem(X), 0
    for index, block in enumerate(model.blocks):
        x = block(x)
        total = total + x.square().mean() * (index + 1)
    total.backward()


def two_heads(model):
    x = model.stem(X)
    for block in model.blocks[:2]:
        x = block(x)
    first = second = x
    for block in model.blocks[2:]:
        first = block(first)
    for block in model.blocks[2:]:
        second = block(second)
    model.head(first * second).sum().backward()


def backward_in_between(model):
    x = model.stem(X)
    for block in model.blocks[:2]:
        x = block(x)
    x.square().sum().backward(retain_graph=True)
    for block in model.blocks[2:]:
        x = block(x)
    model.head(x).square().sum().backward()


def retained(model):
    loss = model(X).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()


def double_backward(model):
    grads = torch.autograd.grad(model(X).square().sum(), list(model.parameters()), create_graph=True)
    sum(grad.square().sum() for grad in grads).backward()


def partly_without_gradients(model):
    x = model.stem(X)
    for index, block in enumerate(model.blocks):
        with torch.set_grad_enabled(index not in (0, 3)):
            x = block(x)
    model.head(x).square().sum().backward()


def frozen_below(model):
    model.stem.requires_grad_(False)
    for block in model.blocks[:2]:
        block.requires_grad_(False)
    model(X).square().sum().backward()


def frozen_in_between(model):
    for block in model.blocks[1::2]:
        block.requires_grad_(False)
    model(X).square().sum().backward()


def accumulated(model):
    for factor in (1, 2, 3):
        model(X * factor).square().sum().backward()


def with_backward_hooks(model):
    seen = []
    hooks = [block.register_full_backward_hook(lambda *grads: seen.append(grads)) for block in model.blocks]
    model(X).square().sum().backward()
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(model.blocks)


def with_forward_hooks(model):
    seen = []
    hooks = [block.register_forward_hook(lambda block, args, y: seen.append((args, y))) for block in model.blocks]
    model(X).square().sum().backward()
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(model.blocks)


def with_keywords(model):
    x = model.stem(X)
    for index, block in enumerate(model.blocks):
        x = block(x=x, scale=torch.tensor(index / 2, requires_grad=True))
    x.square().sum().backward()


def with_random_host(model):
    x = model.stem(X)
    for block in model.blocks:
        torch.rand(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=block is model.blocks[2]):
            x = block(x)
    x.square().sum().backward()


def checkpointed_blocks(model):
    x = model.stem(X)
    for block in model.blocks:
        x = checkpoint(block, x, use_reentrant=False)
    x.square().sum().backward()


RUNS = [interleaved, features, two_heads, backward_in_between, retained, double_backward, partly_without_gradients]
RUNS += [frozen_below, frozen_in_between, accumulated, with_backward_hooks, with_forward_hooks, with_keywords]
RUNS += [with_random_host, checkpointed_blocks]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("method", [Consistent(0.5), BDIA(), Dr2Net()], ids=["consistent", "bdia", "original"])
def test_gradients_equal_the_stored_twin(run, method):
    host, stored = twins(method, dropout=0.0 if run is checkpointed_blocks else 0.3)
    assert all_equal(gradients(host, run), gradients(stored, run))


def test_streams_are_freed_with_the_tensors_that_carry_them():
    host, _ = twins(Rewire())
    x, references = host.stem(X), []
    for block in host.blocks:
        x = block(x)
        references.append(weakref.ref(x))
    del x
    assert [reference() for reference in references] == [None] * len(references)


def test_a_graph_that_is_dropped_frees_the_run():
    host, _ = twins(Consistent())
    gc.disable()
    try:
        x = host.blocks[0](host.stem(X))
        run = weakref.ref(state_of(x).run)
        y = host.blocks[1](x)
        del x
        assert run() is not None
        del y
        assert run() is None
    finally:
        gc.enable()


def test_evaluation_keeps_nothing():
    host, _ = twins(Consistent())
    with torch.no_grad():
        y = host(X)
    with torch.inference_mode():
        assert torch.equal(host(X), y)
    assert torch.equal(host(X), y)


def test_host_sees_ordinary_blocks():
    host, _ = twins(Consistent())
    assert len(host.blocks) == 5
    assert isinstance(host.blocks[3], Block)
    assert type(host.blocks[3]).__name__ == "Block"
    assert host.blocks[3].mlp[0].in_features == 16
    assert "converted by Consistent(a=0.25" in repr(host)
    other = Host()
    other.load_state_dict(host.state_dict())
    host.load_state_dict(other.state_dict(), assign=True)


def run_changed(model, change):
    x = model.stem(X)
    for block in model.blocks:
        x = change(block(x))
    return x


def test_refuses_a_host_that_changes_the_stream():
    host, _ = twins(Consistent())
    with pytest.raises(RuntimeError, match=r"`blocks\.1` was given a tensor that `blocks\.0` did not return"):
        run_changed(host, lambda x: x + 1)
    with pytest.raises(RuntimeError, match=r"output of `blocks\.0` was modified in place before `blocks\.1` read it"):
        run_changed(host, lambda x: x.add_(1))
    hook = host.blocks[2].register_forward_hook(lambda block, args, y: y * 2)
    with pytest.raises(RuntimeError, match=r"`blocks\.3` was given a tensor"):
        host(X)
    hook.remove()
    del host.blocks[2]
    with pytest.raises(RuntimeError, match=r"`blocks\.3` was given a tensor that `blocks\.2` did not return"):
        host(X)


def test_refuses_a_host_that_writes_through_data():
    host, _ = twins(Rewire())
    with pytest.raises(RuntimeError, match=r"output of `blocks\.0` was modified in place before `blocks\.1` read it"):
        run_changed(host, lambda x: x.data[:, 2].mul_(3) is None or x)


class WithSkip(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x, skip=None):
        return x + torch.tanh(self.f(x if skip is None else x + skip))


class PassesOutputs(nn.Module):
    """Passes the outputs of blocks to later blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([WithSkip() for _ in range(4)])

    def forward(self, x):
        outputs = []
        for block in self.blocks:
            x = block(x, outputs[-2] if len(outputs) > 1 else None)
            outputs.append(x)
        return x, outputs


def test_outputs_that_are_arguments_of_later_blocks_are_freed_without_a_backward_pass():
    model = PassesOutputs()
    revnet.convert(model, Rewire(), blocks="blocks")
    alive = [weakref.ref(output) for output in model(torch.randn(2, 4))[1]]
    gc.collect()
    assert not any(reference() is not None for reference in alive)


class Scaled(nn.Module):
    """Reads a number and a tensor from a dict."""

    def __init__(self):
        super().__init__()
        self.f, self.g = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)

    def forward(self, x, context):
        return x + self.g(torch.tanh(self.f(x) * context["scale"] * sum(context["tensors"])))


class ChangesContext(nn.Module):
    """Changes one dict from block to block, and begins with a tensor whose elements share memory."""

    def __init__(self):
        super().__init__()
        self.query, self.blocks = nn.Parameter(torch.randn(1, 2, 4)), nn.ModuleList([Scaled() for _ in range(4)])

    def forward(self, x):
        context = {"tensors": [x]}
        y = self.query.expand(2, -1, -1)
        for index, block in enumerate(self.blocks):
            context["scale"] = index + 1
            y = block(y, context)
            context["tensors"].append(x * index)
        context.clear()
        return y


@pytest.mark.parametrize("method", [Rewire(), Dr2Net(0.9, 0.9), Consistent(), BDIA()], ids=str)
def test_arguments_may_change_between_blocks(method):
    model = ChangesContext().double()
    revnet.convert(model, method, blocks="blocks")
    twin = copy.deepcopy(model)
    set_policy(twin, Store())
    x = torch.randn(2, 2, 4, dtype=torch.float64)
    for module in (model, twin):
        torch.manual_seed(1)  # BDIA draws signs.
        module(x).sin().sum().backward()
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("method", [Consistent(), Dr2Net(1, 0.5)], ids=str)
@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint(), Store()], ids=str)
def test_refuses_a_write_to_the_second_stream(method, has_grad, policy):
    """It is the output of the block before the last one."""
    host, _ = twins(method)
    set_policy(host, policy)
    with torch.set_grad_enabled(has_grad):
        earlier = host.blocks[0](host.stem(X))
        later = host.blocks[1](earlier)
        earlier.relu_()
        with pytest.raises(RuntimeError, match=r"modified in place before `blocks\.2` read it as its second stream"):
            host.blocks[2](later)


def test_refuses_an_output_that_is_overwritten():
    host, _ = twins(Consistent())
    x = host.stem(X)
    for block in host.blocks:
        x = block(x)
    x.add_(1)
    with pytest.raises(ReconstructionError, match="modified by an inplace operation"):
        x.sum().backward()


class Growing(Block):
    def forward(self, x, scale=None):
        return torch.cat([super().forward(x), x], -1)


class Tuples(Block):
    def forward(self, x, scale=None):
        y = super().forward(x)
        return (y, None) if scale is None else (y, scale)


class Lists(Block):
    def forward(self, x, scale=None):
        return [super().forward(x)]


class Overwriting(Block):
    def forward(self, x, scale=None):
        return super().forward(x.mul_(1))


def test_unwraps_tuples_that_carry_only_the_stream():
    for kind, around in ((Tuples, tuple), (Lists, list)):
        torch.manual_seed(0)
        host = Host(2, block=kind)
        revnet.convert(host.blocks, Consistent(0.5))
        y = host.blocks[0](host.stem(X))
        assert type(y) is around
        host.blocks[1](y[0])[0].sum().backward()


@pytest.mark.parametrize(
    ("kind", "error", "match"),
    [
        (Growing, ValueError, r"`0` changes the shape of its stream from \(6, 16\) to \(6, 32\)"),
        (Tuples, TypeError, r"`0` returned a tuple of 2 values and not a single tensor"),
        (Overwriting, RuntimeError, r"`0` modified its input in place"),
    ],
)
def test_refuses_blocks_that_are_not_residual(kind, error, match):
    host = Host(3, block=kind)
    revnet.convert(host.blocks, Consistent(0.5))
    with pytest.raises(error, match=match) as caught:
        host(X, torch.tensor(1.0))
    assert "\n" not in str(caught.value)


def test_refuses_what_is_not_a_stream():
    host, _ = twins(Consistent())
    for x in (None, (X, X), torch.ones(2, 16, dtype=torch.long)):
        with pytest.raises(TypeError, match=r"the stream of `blocks\.0` .* must be a floating-point tensor"):
            host.blocks[0](x)
    with pytest.raises(TypeError, match=r"dtype torch\.bfloat16, in which what a whole block adds to it is lost"):
        host.bfloat16()(X.bfloat16())


class DynamicCache:
    """An object with the name of a cache of transformers."""


def test_refuses_caches_only_with_gradients():
    class Takes(Block):
        def forward(self, x, cache=None):
            return super().forward(x)

    model = Host(2, block=Takes)
    revnet.convert(model.blocks, Consistent())
    with torch.no_grad():
        model.blocks[0](model.stem(X), DynamicCache())
    with pytest.raises(ValueError, match="use_cache=False"):
        model.blocks[0](model.stem(X), cache=DynamicCache())


def test_policies_of_this_library_are_not_checkpointing_of_the_host():
    class Switchable(Block, HasGradientCheckpointing):
        pass

    stages = PolicySequential(*[nn.Sequential(*[Switchable() for _ in range(2)]) for _ in range(2)])
    for stage in "01":
        revnet.convert(stages, Rewire(), blocks=stage)
        assert stages.gradient_checkpointing
    stages, inputs = stages.double(), torch.randn(2, 16, dtype=torch.float64)
    expected = gradients(stages, lambda model: model(inputs).sum().backward())
    revnet.set_policy(stages, "checkpoint")
    actual = gradients(stages, lambda model: model(inputs).sum().backward())
    assert all(map(torch.allclose, actual, expected))


def test_refuses_checkpointing_that_is_turned_on_later():
    host, _ = twins(Consistent())
    host.blocks[1].gradient_checkpointing = True
    with pytest.raises(ValueError, match=r"`blocks\.1` has its own checkpointing on"):
        host(X)


def test_refuses_shallow_copies():
    host, _ = twins(Consistent())
    with pytest.raises(RuntimeError, match=r"`blocks\.0` is a shallow copy of a converted block"):
        copy.copy(host.blocks[0])(host.stem(X))


def test_compiles_around_the_blocks():
    host, stored = twins(Consistent(0.5), num_blocks=2)
    torch._dynamo.reset()
    compiled = torch.compile(host, backend="eager")
    expected = gradients(stored, lambda model: model(X).square().sum().backward())
    gradients(host, lambda _: compiled(X).square().sum().backward())
    assert all_equal([parameter.grad for parameter in host.parameters()], expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", [BDIA(), Rewire(), Dr2Net(1, 0)], ids=str)
@pytest.mark.parametrize("policy", ["reverse", "store"])
# The compiler reads this attribute of each input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_refuses_to_be_part_of_one_graph(method, policy):
    host, _ = twins(method, num_blocks=2)
    revnet.set_policy(host, policy)
    expected = gradients(host, lambda model: model(X).sum().backward())
    torch._dynamo.reset()
    compiled = torch.compile(host, backend="eager", fullgraph=True)
    with pytest.raises(
        Exception, match=r"`blocks\.0` is a converted block, .*; compile without `fullgraph=True`, .*\.\n"
    ):
        compiled(X)
    # The modules inside the blocks can be compiled, and the model without its blocks.
    for block in host.blocks:
        block.mixer.forward = torch.compile(block.mixer.forward, backend="eager", fullgraph=True)
    compiled = torch.compile(host, backend="eager")
    assert all_equal(gradients(host, lambda _: compiled(X).sum().backward()), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, True])
def test_refuses_to_be_exported(strict):
    host, _ = twins(Consistent(0.5), num_blocks=2)
    with pytest.raises(NotImplementedError, match=r"`blocks\.0` is a converted block, .* for the export\.$"):
        torch.export.export(host.eval(), (X,), strict=strict)


BRANCHES = ["norm1 mixer", "norm2 mlp"]


class Adapted(nn.Module):
    """A layer with an adapter of low rank, which has no effect at first."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.down, self.up = layer, nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("branches", [None, BRANCHES])
def test_modules_may_be_replaced_after_the_conversion(branches, has_run):
    """As PEFT does."""
    model, stored = twins(Consistent(0.5), branches=branches)
    for host in (model, stored):
        if has_run:
            host(X)
        torch.manual_seed(3)
        for block in host.blocks:
            block.mixer = Adapted(block.mixer.requires_grad_(False))
    results = [gradients(host, lambda host: host(X).square().sum().backward()) for host in (model, stored)]
    assert all_equal(*results)
    assert all(block.mixer.up.weight.grad.any() for block in model.blocks)
    before = model(X)
    nn.init.ones_(model.blocks[1].mixer.up.weight)
    assert not torch.equal(model(X), before)
    del model.blocks[0].mlp
    if branches:
        with pytest.raises(ValueError, match=r"`branches` names 'mlp', which `blocks\.0` \(=Block\) does not have"):
            model(X)


class CountingCache(DynamicCache):
    """A cache that counts the tokens which it was given."""

    def __init__(self):
        self.length = 0


def test_branches_are_compared_without_side_effects():
    """On caches, hooks and tensors with a graph, as the old `weight_norm` leaves them in a module."""

    class Mixer(nn.Linear):
        def forward(self, x, cache):
            cache.length += len(x)
            return super().forward(x)

    class Caching(Block):
        def __init__(self, *args):
            super().__init__(*args)
            self.mixer = Mixer(16, 16)
            self.register = torch.ones(2, requires_grad=True) * 2

        def forward(self, x, cache):
            x = x + self.mixer(self.norm1(x), cache)
            return x + self.mlp(self.norm2(x))

    calls, cache = [], CountingCache()
    host = Host(2, block=Caching)
    host.blocks[0].mixer.register_forward_hook(lambda *_: calls.append("after"))
    host.blocks[0].mixer.register_forward_pre_hook(lambda *_: calls.append("before"))
    revnet.convert(host.blocks, Consistent(0.5), branches=BRANCHES)
    with torch.no_grad():
        host.blocks[0](host.stem(X), cache)
    assert (cache.length, calls) == (len(X), ["before", "after"])


@pytest.mark.parametrize("method", [Consistent(0.5), Dr2Net(0.5, 0), Dr2Net(1, 0)], ids=str)
def test_branches_return_what_the_block_returns(method):
    for kind, around in ((Tuples, tuple), (Lists, list)):
        host = Host(1, block=kind)
        expected = host.blocks[0](host.stem(X))
        revnet.convert(host.blocks, method, branches=BRANCHES)
        y = host.blocks[0](host.stem(X))
        assert (type(y), len(y), y[0].shape) == (around, len(expected), expected[0].shape)


@pytest.mark.parametrize("kind", ["Adapter", "bfloat16"])
def test_refuses_gradients_that_pass_by_the_output_of_a_block(kind):
    if kind == "Adapter":
        host = Host(3)
        for block in host.blocks:
            block.adapter = nn.Linear(16, 16)
        revnet.convert(host.blocks, Adapter(a=0.5))
        x, why = X, "`Adapter` shows the host the mean of two streams"
    else:
        host, _ = twins(Consistent(0.5), 3, torch.bfloat16, branches=BRANCHES)
        x, why = X.bfloat16(), r"streams are wider than torch\.bfloat16"
    for how, what in (
        (lambda y: y.retain_grad(), "retains its"),
        (lambda y: y.register_hook(print), "has a backward hook"),
    ):
        y = host.blocks[0](host.stem(x))
        how(y)
        with pytest.raises(ValueError, match=rf"the output of `.*0` {what}.*{why}"):
            host.blocks[1](y)
    host.blocks[2].register_full_backward_hook(lambda *_: None)  # The host reads this output.
    host(x).sum().backward()
    host.blocks[0].register_full_backward_hook(lambda *_: None)
    with torch.no_grad():
        host(x)
    with pytest.raises(ValueError, match=rf"0` has a backward hook, which would not run, .*{why}"):
        host(x)


def test_branches_are_compared_with_the_block():
    for branches in (["mixer", "norm2 mlp"], ["norm2 mlp", "norm1 mixer"]):
        host, _ = twins(Consistent(), branches=branches)
        with pytest.raises(ValueError, match=r"`branches` do not compute what `blocks\.0` \(=Block\) computes"):
            host(X)
    host, _ = twins(Dr2Net(0.5, 0.5), dropout=0.5, branches=["norm1 mixer dropout", "norm2 mlp"])
    host(X)


def test_batch_norm_statistics_are_taken_again():
    class Normalized(nn.Module):
        def __init__(self, width, _):
            super().__init__()
            self.linear, self.norm = nn.Linear(width, width), nn.BatchNorm1d(width)

        def forward(self, x, scale=None):
            return x + self.norm(self.linear(x))

    torch.manual_seed(0)
    host = Host(4, block=Normalized)
    revnet.convert(host.blocks, Dr2Net())
    batches = [torch.randn(32, 4) for _ in range(4)]
    torch.optim.swa_utils.update_bn(batches, host)
    before = [block.norm.running_var.clone() for block in host.blocks]
    set_method(host, Consistent(0.5))
    torch.optim.swa_utils.update_bn(batches, host)
    for index, (block, old) in enumerate(zip(host.blocks, before, strict=True)):
        assert torch.allclose(block.norm.running_var, old, rtol=1e-3) == (index == 0)
        assert block.norm.num_batches_tracked == len(batches)
