"""Cases in which a reversible library may be silently wrong: each gives the right result, or an error that names the
cause."""

import gc
import random
import warnings
import weakref
from functools import partial
from types import MethodType

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

from revnet import (
    Checkpoint,
    FixedPoint,
    Offload,
    ReconstructionError,
    ReconstructionWarning,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
    Store,
    coupling,
    set_policy,
)
from revnet.engine import _states
from revnet.memory.step._live import LiveBytes
from revnet.nn import MomentumBlock
from tests.helpers import ConvResidual, gradients, mlp, stored_twin


def mlp_stack(depth=4, width=8, policy=None, **options):
    return ReversibleSequential(
        *[ReversibleBlock(mlp(width), mlp(width), split_dim=-1, **options) for _ in range(depth)],
        policy=policy or Reverse(),
    )


def backward(sequence, x, **kwargs):
    loss = sequence(x, **kwargs).square().mean()
    loss.backward()
    return loss


# What a sequence runs -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "wrap",
    [torch.compile, lambda block: nn.Sequential(block), lambda block: nn.Linear(4, 4)],
    ids=["compile", "sequential", "linear"],
)
def test_names_a_block_that_was_replaced_by_another_module(wrap):
    sequence = mlp_stack(3)
    sequence.blocks[1] = wrap(sequence.blocks[1])
    kind = type(sequence.blocks[1]).__name__
    for run in (sequence, sequence.inverse, lambda x: sequence.policy_units):
        with pytest.raises(TypeError, match=rf"`blocks\[1\]` is now a {kind}, which is not a reversible block"):
            run(torch.randn(2, 16))


@pytest.mark.parametrize("change", ["delete", "append"])
def test_blocks_may_be_deleted_and_appended(change):
    sequence = mlp_stack(3)
    x = torch.randn(2, 16)
    backward(sequence, x)
    if change == "delete":
        del sequence.blocks[1]
    else:
        sequence.blocks.append(ReversibleBlock(mlp(8), mlp(8), split_dim=-1))
    twin = stored_twin(sequence)
    assert len(sequence.policies) == len(sequence.blocks)
    sequence.zero_grad()
    assert torch.equal(backward(sequence, x), backward(twin, x))
    torch.testing.assert_close(gradients(sequence), gradients(twin))


def test_different_numbers_of_blocks_and_policies_raise():
    sequence = mlp_stack(3, policy=[Reverse(), Store(), Reverse()])
    del sequence.blocks[1]
    with pytest.raises(ValueError, match="`blocks` has 2 entries, but `policies` has 3, not all equal"):
        sequence(torch.randn(2, 16))
    sequence.set_policies([Reverse(), Store()])
    backward(sequence, torch.randn(2, 16))


class Counting(ReversibleBlock):
    """A block with a `forward` of its own."""

    calls = 0

    def forward(self, x, *args, **kwargs):
        self.calls += 1
        return super().forward(x, *args, **kwargs)


@pytest.mark.parametrize("policy", [Reverse(), Store(), Checkpoint()], ids=str)
def test_calls_the_forward_of_a_subclass(policy):
    sequence = ReversibleSequential(*[Counting(mlp(8), mlp(8), split_dim=-1) for _ in range(3)], policy=policy)
    backward(sequence, torch.randn(2, 16))
    assert [block.calls for block in sequence] == [1, 1, 1]


def test_calls_a_forward_set_on_a_block():
    sequence = mlp_stack(3)
    calls = []
    old = sequence.blocks[1].forward

    def new(*args, **kwargs):
        calls.append(1)
        return old(*args, **kwargs)

    sequence.blocks[1].forward = new
    backward(sequence, torch.randn(2, 16))
    assert calls == [1]


def test_forward_that_changes_the_result_raises():
    class Doubling(ReversibleBlock):
        def forward(self, x, *args, **kwargs):
            return tuple(2 * stream for stream in super().forward(x, *args, **kwargs))

    class Skipping(ReversibleBlock):
        def forward(self, x, *args, **kwargs):
            return x

    for kind, message in ((Doubling, "replaced its output"), (Skipping, "did not call the one that it replaces")):
        with pytest.raises(RuntimeError, match=message):
            ReversibleSequential(kind(mlp(8), mlp(8), split_dim=-1))(torch.randn(2, 16))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiling_a_block_compiles_its_functions():
    block = ReversibleBlock(mlp(8), mlp(8), split_dim=-1)
    num_graphs = 0

    def backend(graph, inputs):
        nonlocal num_graphs
        num_graphs += 1
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    block.compile(backend=backend)
    assert block._compiled_call_impl is None
    assert block.f._compiled_call_impl is not None
    assert block.g._compiled_call_impl is not None
    x = torch.randn(2, 16, requires_grad=True)
    backward(ReversibleSequential(block, ReversibleBlock(mlp(8), mlp(8), split_dim=-1)), x)
    assert x.grad is not None
    assert num_graphs > 0, "PyTorch does not compile an `nn.Sequential` that compiles itself"


# Arguments ------------------------------------------------------------------------------------------------------------


class Scaled(nn.Module):
    """A function with one required argument."""

    def __init__(self, width, name):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.name = name

    def forward(self, x, **kwargs):
        assert set(kwargs) == {self.name}, kwargs
        return torch.tanh(self.linear(x)) * kwargs[self.name]


@pytest.mark.parametrize("policy", [Reverse(), Store(), Checkpoint(), Offload()], ids=str)
def test_passes_arguments_by_function(policy):
    blocks = [ReversibleBlock(Scaled(4, "mask"), Scaled(4, "scale"), split_dim=-1) for _ in range(3)]
    mask = torch.rand(2, 4, requires_grad=True)
    kwargs = {"f_kwargs": {"mask": mask}, "g_kwargs": {"scale": 0.5}}
    sequence, twin = ReversibleSequential(*blocks, policy=policy), ReversibleSequential(*blocks, policy=Store())
    x = torch.randn(2, 8)
    actual = torch.autograd.grad(sequence(x, **kwargs).sin().sum(), [mask, *sequence.parameters()])
    expected = torch.autograd.grad(twin(x, **kwargs).sin().sum(), [mask, *twin.parameters()])
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(sequence.inverse(sequence(x, **kwargs), **kwargs), x)
    assert torch.equal(blocks[0](x, **kwargs), sequence[:1](x, **kwargs))


def test_checks_arguments_by_function():
    sequence = ReversibleSequential(ReversibleBlock(Scaled(4, "mask"), Scaled(4, "scale"), split_dim=-1))
    x = torch.randn(2, 8)
    with pytest.raises(TypeError, match=r"`f_kwargs` .* must be a dict of keyword arguments"):
        sequence(x, f_kwargs=3)
    with pytest.raises(TypeError, match=r"`f_kwargs` has the key 1, but keyword arguments have names; pass strings"):
        sequence(x, f_kwargs={1: 1})
    with pytest.raises(TypeError, match=r"`kwargs` has the key 1, but keyword arguments have names; pass strings"):
        sequence.record(x, kwargs={1: 1})
    with pytest.raises(TypeError, match="`mask` is in `f_kwargs` and among the arguments of all functions"):
        sequence(x, mask=1, f_kwargs={"mask": 1})
    with pytest.raises(TypeError, match="`g_kwargs` is for residual functions named `g`"):
        MomentumBlock(mlp(4))(torch.randn(2, 8), g_kwargs={"scale": 1})


@pytest.mark.parametrize("policy", [Reverse(), Store(), Checkpoint(), Offload()], ids=str)
def test_momentum_block_takes_arguments(policy):
    sequence = ReversibleSequential(*[MomentumBlock(Scaled(4, "mask")) for _ in range(3)], policy=policy)
    mask = torch.rand(2, 4)
    backward(sequence, torch.randn(2, 8), mask=mask)
    assert all(parameter.grad is not None for parameter in sequence.parameters())


# What must be the same in both runs -----------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Adds numbers that PyTorch cannot repeat."""

    def __init__(self, width, source, size=0.1):
        super().__init__()
        self.inner = mlp(width)
        self.source, self.size = source, size
        self.count = 0
        self.generator = torch.Generator().manual_seed(0)
        self.elsewhere = 1.0
        random.seed(0)  # Two unseeded numbers may be too close to tell apart.
        np.random.seed(0)

    def forward(self, x):
        if self.source == "python":
            scale = random.random()
        elif self.source == "numpy":
            scale = float(np.random.rand())
        elif self.source == "generator":
            scale = torch.rand((), generator=self.generator)
        elif self.source == "counter":
            self.count += 1
            scale = self.count
        else:
            scale = self.elsewhere
        return self.inner(x * (1 + self.size * scale))


@pytest.mark.parametrize("source", ["python", "numpy", "generator", "counter"])
@pytest.mark.parametrize("index", [0, 3, 7])
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_different_numbers_in_the_second_run_raise(policy, index, source):
    """The function is the first, a middle one, or the last, whose input is bit for bit the same."""
    sequence = mlp_stack(4, policy=policy)
    block, role = sequence.blocks[index // 2], "fg"[index % 2]
    setattr(block, role, Noisy(8, source))
    loss = sequence(torch.randn(16, 16)).square().mean()
    with pytest.raises(ReconstructionError, match=rf"`blocks\.{index // 2}\.{role}` returned different numbers"):
        loss.backward()


def draw(shape):
    """Draw numbers that PyTorch cannot repeat."""
    return torch.from_numpy(np.random.default_rng(random.randrange(2**32)).random(shape, np.float32))


NOISES = {
    "mask": lambda m, x: m.outer(m.inner(x)) * (draw(x.shape) > 0.5),
    "index": lambda m, x: m.outer(m.inner(x))[:, draw(x.shape[1:]).argsort()],
    "branch": lambda m, x: m.inner(x).tanh() * draw(x.shape) + m.outer(x),
    "state": lambda m, x: (m.inner(x) * m.next_number()).softmax(-1) + m.outer(x).tanh(),
}


class NoisyPart(nn.Module):
    """Has a mask, an index or a branch that PyTorch cannot repeat, and that the last saved number does not show."""

    def __init__(self, width, noise):
        super().__init__()
        self.inner, self.outer = mlp(width), nn.Linear(width, width)
        self.noise, self.count = noise, 0
        random.seed(0)

    def next_number(self):
        self.count += 1
        return self.count

    def forward(self, x):
        return NOISES[self.noise](self, x)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("index", [0, 3])
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_a_part_with_different_numbers_raises(policy, index, noise, dtype):
    sequence = mlp_stack(4, policy=policy)
    block, role = sequence.blocks[index // 2], "fg"[index % 2]
    setattr(block, role, NoisyPart(8, noise))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = sequence(torch.randn(16, 16)).square().mean()
    with pytest.raises(ReconstructionError, match=rf"`blocks\.{index // 2}\.{role}` returned different numbers"):
        loss.backward()


@pytest.mark.parametrize("source", ["numpy", "generator"])
@pytest.mark.parametrize("index", [0, 3, 7])
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_different_numbers_raise_under_autocast(policy, index, source):
    sequence = mlp_stack(4, policy=policy)
    block, role = sequence.blocks[index // 2], "fg"[index % 2]
    setattr(block, role, Noisy(8, source, size=1.0))
    with torch.autocast("cpu", torch.bfloat16):
        loss = sequence(torch.randn(16, 16)).square().mean()
    with pytest.raises(ReconstructionError, match=rf"`blocks\.{index // 2}\.{role}` returned different numbers"):
        loss.backward()


class HalfFilled(torch.autograd.Function):
    """Saves a buffer of which it fills a half."""

    @staticmethod
    def forward(ctx, x):
        buffer = torch.empty(2, *x.shape)
        buffer[0] = x.tanh()
        ctx.save_for_backward(buffer)
        return buffer[0].clone()

    @staticmethod
    def backward(ctx, gradient):
        (buffer,) = ctx.saved_tensors
        return gradient * (1 - buffer[0] ** 2)


def with_ctc(m, x):
    scores = m.inner(x).log_softmax(-1).unsqueeze(1).expand(-1, 2, -1)
    targets = torch.tensor([[1, 2, 3, 1, 2], [2, 0, 0, 0, 0]])
    loss = nn.functional.ctc_loss(scores, targets, torch.tensor([160, 20]), torch.tensor([5, 1]), zero_infinity=True)
    return m.outer(x) * (1 + 0.01 * loss)


def with_padding(m, x):
    padded = x.new_empty(len(x), 12)
    padded[:, :8] = m.inner(x)
    return m.outer(nn.functional.silu(padded)[:, :8])


def with_a_write_after_a_use(m, x):
    h = m.inner(x)
    m.auxiliary = h.pow(2).mean().detach()
    return h.add_(m.outer(x.tanh()).detach())


def with_rrelu_in_place(m, x):
    h = m.inner(x)
    nn.functional.rrelu_(h[:, :4], training=False)
    return m.outer(h)


HALF_FILLED = {
    "rrelu": lambda m, x: m.outer(nn.functional.rrelu(m.inner(x), training=False)),
    "rrelu in place": with_rrelu_in_place,
    "ctc": with_ctc,
    "own function": lambda m, x: m.outer(HalfFilled.apply(m.inner(x))),
    "padding": with_padding,
    "write after a use": with_a_write_after_a_use,
}


@pytest.mark.parametrize("name", HALF_FILLED)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_memory_without_fixed_values_does_not_raise(policy, name, monkeypatch):
    """Some operators save memory of which they fill only a part."""
    monkeypatch.setitem(NOISES, name, HALF_FILLED[name])
    functions = [NoisyPart(8, name) for _ in range(4)]
    blocks = [ReversibleBlock(f, g, split_dim=-1) for f, g in zip(functions[::2], functions[1::2], strict=True)]
    sequence = ReversibleSequential(*blocks, policy=policy)
    loss = sequence(torch.randn(160, 16)).square().mean()
    scraps = [
        torch.full(shape, -float(number)) for number in range(1, 99) for shape in ((160, 8), (160, 2, 11), (160, 12))
    ]
    scraps.clear()  # The replay gets memory with these numbers.
    loss.backward()


class Sorting(nn.Module):
    """Sorts its rows, so that rounding may move all of them; it repeats itself."""

    def __init__(self, width):
        super().__init__()
        self.inner, self.outer = mlp(width), nn.Linear(width, width)

    def forward(self, x):
        order = self.inner(x).sum(-1).argsort()
        return self.outer(x[order].tanh())[order.argsort()]


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_sorted_parts_do_not_raise(policy, dtype):
    sequence = ReversibleSequential(
        *[ReversibleBlock(Sorting(8), Sorting(8), split_dim=-1) for _ in range(4)], policy=policy
    )
    # Rows that are equal but for rounding.
    x = torch.randn(1, 16) + 1e-6 * torch.randn(64, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        loss = sequence(x).square().mean()
    loss.backward()


@pytest.mark.parametrize("index", [0, 3, 7])
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_attribute_changed_before_backward_raises(policy, index):
    sequence = mlp_stack(4, policy=policy)
    block, role = sequence.blocks[index // 2], "fg"[index % 2]
    noisy = Noisy(8, "attribute", size=1.0)
    setattr(block, role, noisy)
    loss = sequence(torch.randn(16, 16)).square().mean()
    noisy.elsewhere = 1.1
    with pytest.raises(ReconstructionError, match=rf"`blocks\.{index // 2}\.{role}` returned different numbers"):
        loss.backward()


@pytest.mark.parametrize("source", ["python", "counter"])
def test_different_numbers_raise_under_an_exact_coupling(source):
    sequence = mlp_stack(4, coupling=FixedPoint())
    sequence.blocks[1].g = Noisy(8, source, size=1e-2)
    loss = sequence(torch.randn(16, 16)).square().mean()
    with pytest.raises(ReconstructionError, match=r"`blocks\.1\.g` returned different numbers"):
        loss.backward()


@pytest.mark.parametrize(
    "rule", [coupling.Additive(), coupling.Scaled.consistent(1e-3), coupling.Momentum(1e-3)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_error_that_a_stream_already_had_does_not_raise(rule, dtype):
    """The error of a large stream, or of one that was divided by a small factor, shows where the stream is small."""
    for seed in range(5):
        torch.manual_seed(seed)
        functions = [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(6)]
        functions[3] = functions[3][1]  # Reads the size of its stream.
        pairs = zip(functions[::2], functions[1::2], strict=True)
        blocks = [ReversibleBlock(f, g, split_dim=-1, coupling=rule) for f, g in pairs]
        sequence = ReversibleSequential(*blocks).to(dtype)
        x = torch.randn(64, 32, dtype=dtype)
        x[:, :16] *= 1e5
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReconstructionWarning)
            backward(sequence, x)


class Branches(nn.Module):
    """Takes one of two branches in each run."""

    def __init__(self, width, branches):
        super().__init__()
        self.inner, self.branches = mlp(width), iter(branches)

    def forward(self, x):
        return self.inner(x) * next(self.branches)


@pytest.mark.parametrize("branches", ["10111000", "01000111", "10000101", "10000000", "10001000", "10110000"])
def test_a_function_that_takes_another_branch_raises(branches):
    """The first run and the replay differ; the runs of the check agree with one or the other, or with neither."""
    function = Branches(8, map(int, branches))
    sequence = ReversibleSequential(ReversibleBlock(mlp(8), function, split_dim=-1))
    loss = sequence(torch.randn(16, 16)).square().mean()
    with pytest.raises(ReconstructionError, match=r"`blocks\.0\.g` returned different numbers"):
        loss.backward()


def conv_stack(depth, width=4):
    return ReversibleSequential(*[ReversibleBlock(ConvResidual(width), ConvResidual(width)) for _ in range(depth)])


def scale_weights(module, factor):
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)


@pytest.mark.parametrize(
    "kind", ["deep", "mixed", "scaled", pytest.param("trained", marks=pytest.mark.slow), "deterministic"]
)
def test_correct_functions_do_not_raise(kind):
    """Amplified rounding is not an error, and not even a warning if the gradients are good."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        if kind == "deep":
            backward(conv_stack(256), torch.randn(2, 8, 8, 8))
        elif kind == "mixed":
            warnings.simplefilter("ignore", ReconstructionWarning)
            with torch.autocast("cpu", torch.bfloat16):
                loss = conv_stack(64)(torch.randn(2, 8, 8, 8)).square().mean()
            loss.backward()
        elif kind == "scaled":
            warnings.simplefilter("ignore", ReconstructionWarning)
            for sequence, x in ((conv_stack(32), torch.randn(2, 8, 8, 8)), (mlp_stack(16), torch.randn(16, 16))):
                scale_weights(sequence, 4)
                backward(sequence, x)
        elif kind == "trained":
            warnings.simplefilter("ignore", ReconstructionWarning)
            sequence = mlp_stack(16)
            optimizer = torch.optim.Adam(sequence.parameters(), lr=3e-3)
            x, y = torch.randn(64, 16), torch.randn(64, 16)
            for _ in range(500):
                optimizer.zero_grad()
                (sequence(x) - y).square().mean().backward()
                optimizer.step()
        else:
            torch.use_deterministic_algorithms(True)
            try:
                backward(conv_stack(16), torch.randn(2, 8, 8, 8))
            finally:
                torch.use_deterministic_algorithms(False)


class NoisyAtTheEnd(nn.Module):
    """Draws after the last tensor that autograd saves; a replay that stops there has not drawn yet."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) + torch.randn_like(x)


def assert_same_numbers(make, policy, *, num_drawn):
    """Check gradients and random state against the twin, after drawing `num_drawn` numbers before the backward pass."""
    sequence = ReversibleSequential(*[ReversibleBlock(make(), make(), split_dim=-1) for _ in range(2)], policy=policy)
    twin = stored_twin(sequence)
    x = torch.randn(3, 8)
    ends = []
    for module in (sequence, twin):
        torch.manual_seed(1)
        loss = module(x).square().mean()
        torch.rand(num_drawn)
        loss.backward()
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)
    torch.testing.assert_close(gradients(sequence), gradients(twin))


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_draws_after_the_last_saved_tensor_do_not_raise(policy):
    assert_same_numbers(NoisyAtTheEnd, policy, num_drawn=0)


class Forked(nn.Module):
    """Draws random numbers and restores the random state; the last saved tensor does not depend on them."""

    def __init__(self, seeds=False):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.seeds = seeds

    def forward(self, x):
        if self.seeds:
            torch.manual_seed(7)
            return self.first(nn.functional.dropout(x, 0.5))
        with torch.random.fork_rng(devices=[]):
            a = nn.functional.dropout(self.first(x), 0.5)
        return a + self.second(x).tanh()


@pytest.mark.parametrize("seeds", [False, True])
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_function_that_restores_the_random_state_itself(policy, seeds):
    """The random state is the same before and after, so nothing shows that the function drew. Something else draws
    before the backward pass.
    """
    assert_same_numbers(partial(Forked, seeds), policy, num_drawn=3)


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_keeps_a_forward_set_on_a_batch_norm(policy):
    sequence = conv_stack(2, width=8)
    sequence.set_policies(policy)
    x = torch.randn(2, 16, 4, 4)
    backward(sequence, x)
    norm = next(module for module in sequence.modules() if isinstance(module, nn.BatchNorm2d))
    norm.forward = MethodType(lambda self, y: 2 * nn.BatchNorm2d.forward(self, y), norm)
    twin = stored_twin(sequence)
    for module in (sequence, twin):
        module.zero_grad()
        backward(module, x)
    assert "forward" in norm.__dict__
    torch.testing.assert_close(gradients(sequence), gradients(twin), rtol=1e-3, atol=1e-5)


class PenaltyOfParameters(nn.Module):
    """Differentiates inside itself, with respect to its parameters only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        (slope,) = torch.autograd.grad((self.first.weight * self.second.weight).sum(), self.first.weight)
        return self.first(x).tanh() + self.second(x) * slope.mean()


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_function_that_differentiates_its_parameters(policy):
    blocks = [ReversibleBlock(PenaltyOfParameters(), PenaltyOfParameters(), split_dim=-1) for _ in range(2)]
    sequence = ReversibleSequential(*blocks, policy=policy)
    twin = stored_twin(sequence)
    x = torch.randn(3, 8)
    for module in (sequence, twin):
        backward(module, x)
    torch.testing.assert_close(gradients(sequence), gradients(twin))


def test_lazily_conjugated_or_negated_streams_do_not_raise():
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(4), mlp(4), split_dim=-1) for _ in range(2)]).double()
    z = torch.randn(2, 3, 4, dtype=torch.complex128)
    streams = tuple(z.conj().imag)
    assert streams[0].is_neg()
    sum(y.sum() for y in sequence(streams)).backward()


def test_hooks_that_switch_autocast():
    sequence = mlp_stack(2)
    device = "cpu"
    sequence.blocks[1].f.register_forward_pre_hook(lambda *_: torch.set_autocast_enabled(device, True))
    sequence.blocks[1].g.register_forward_hook(lambda *_: torch.set_autocast_enabled(device, False))
    try:
        backward(sequence, torch.randn(3, 16))
    finally:
        torch.set_autocast_enabled(device, False)


def test_warns_of_an_inaccurate_small_channel():
    """The channel's share of the stream's norm is negligible, but a function that normalizes each channel reads it in
    full."""
    torch.manual_seed(0)
    sequence = conv_stack(4, width=8)
    x = torch.randn(8, 16, 8, 8)
    x[:, 11] *= 1e-7  # In the stream that the first function reads.
    with pytest.warns(ReconstructionWarning, match=r"the stream that `blocks\.0\.f` reads was rebuilt with"):
        backward(sequence, x)


def test_tolerance_holds_for_a_small_channel():
    """Without the tolerance, a parameter's gradient is off by four fifths; one keyframe corrects it."""
    torch.manual_seed(0)
    sequence = conv_stack(4, width=8)
    twin = stored_twin(sequence)
    sequence.tolerance = 1e-3
    x = torch.randn(8, 16, 8, 8)
    x[:, 11] *= 1e-7  # In the stream that the first function reads.
    for module in (sequence, twin):
        backward(module, x)
    assert sequence.keyframes == ("blocks.0.g",)
    for parameter, other in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert (parameter.grad - other.grad).norm() < 1e-3 * other.grad.norm()


@pytest.mark.parametrize("how", ["data", "numpy"])
@pytest.mark.parametrize("joined", [True, False])
def test_output_overwritten_without_a_version_raises(how, joined):
    sequence = mlp_stack(4)
    x = torch.randn(64, 16)
    y = sequence(x) if joined else sequence(tuple(x.chunk(2, -1)))[1]
    loss = y.square().mean()
    if how == "data":
        y.data.clamp_(max=y.data.max() - 1e-3)
    else:
        y.detach().numpy()[3, 5] += 0.5
    with pytest.raises(ReconstructionError, match="was overwritten after the forward pass"):
        loss.backward()


def test_output_with_another_layout_does_not_raise():
    """The streams have the layout of the input, and the parts of the joined output have another one."""
    sequence = conv_stack(3)
    backward(sequence, torch.randn(2, 8, 5, 6).transpose(2, 3))
    backward(sequence, torch.randn(2, 8, 5, 5).to(memory_format=torch.channels_last))


def test_output_with_freed_memory_raises():
    sequence = mlp_stack(4)
    y = sequence(torch.randn(4, 16))
    loss = y.sum()
    y.untyped_storage().resize_(0)
    with pytest.raises(ReconstructionError, match=r"was freed after the forward pass"):
        loss.backward()


# State ----------------------------------------------------------------------------------------------------------------


class MaxNorm(nn.Module):
    """Replaces its weight's memory, as max-norm constraints do."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)

    def forward(self, x):
        weight = self.linear.weight
        weight.data = weight.data / weight.data.norm(dim=1, keepdim=True).clamp_min(1)
        return torch.tanh(self.linear(torch.tanh(x)))


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_parameter_with_rebound_memory(policy):
    """Tensors that last are identified by the object, not by an address that the allocator may reuse."""
    torch.manual_seed(0)
    blocks = [ReversibleBlock(MaxNorm(8), MaxNorm(8), split_dim=-1) for _ in range(4)]
    sequence = ReversibleSequential(*blocks, policy=policy).double()
    scale_weights(sequence, 8)
    twin = stored_twin(sequence)
    x = torch.randn(16, 16, dtype=torch.float64)
    for module in (sequence, twin):
        backward(module, x)
    torch.testing.assert_close(gradients(sequence), gradients(twin))


class Teacher(nn.Module):
    """Averages its weight in a second tensor, written through `.data` or NumPy."""

    def __init__(self, width, kind, how):
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        average = torch.zeros(width, width)
        if kind == "parameter":
            self.average = nn.Parameter(average, requires_grad=False)
        else:
            self.register_buffer("average", average)
        self.how = how

    def forward(self, x):
        if self.how == "data":
            self.average.data.mul_(0.5).add_(self.linear.weight.data, alpha=0.5)
        else:
            array = self.average.detach().numpy()
            array *= 0.5
            array += 0.5 * self.linear.weight.detach().numpy()
        return torch.tanh(self.linear(x) @ self.average)


@pytest.mark.parametrize("how", ["data", "numpy"])
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_buffer_written_without_a_version_is_updated_once(policy, how):
    torch.manual_seed(0)
    blocks = [ReversibleBlock(Teacher(8, "buffer", how), mlp(8), split_dim=-1) for _ in range(3)]
    sequence = ReversibleSequential(*blocks, policy=policy)
    twin = stored_twin(sequence)
    x = torch.randn(16, 16)
    for _ in range(3):
        for module in (sequence, twin):
            module.zero_grad()
            backward(module, x)
        torch.testing.assert_close(gradients(sequence), gradients(twin), rtol=1e-4, atol=1e-6)
    for buffer, expected in zip(sequence.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, expected)


class Counter(nn.Module):
    """Counts its calls in a matrix, written through `.data`, and adds a table of positions."""

    def __init__(self, width, dtype):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("counts", torch.zeros(2, 3, dtype=dtype))
        self.register_buffer("table", torch.randn(16, width))

    def forward(self, x):
        self.counts.data.add_(1)
        return torch.tanh(self.linear(x) + self.table)


@pytest.mark.parametrize("on_host", [True, False], ids=["host", "accelerator"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_buffer_of_any_type_is_written_once(policy, dtype, on_host, monkeypatch):
    if not on_host:  # The same comparison, with tensors of the CPU.
        monkeypatch.setattr(_states, "is_on_host", lambda x: False)
        monkeypatch.setattr(_states, "is_on_accelerator", lambda x: True)
    blocks = [ReversibleBlock(Counter(8, dtype), mlp(8), split_dim=-1) for _ in range(2)]
    sequence = ReversibleSequential(*blocks, policy=policy)
    x = torch.randn(16, 16)
    for _ in range(3):
        backward(sequence, x)
    assert [block.f.counts.unique().tolist() for block in sequence] == [[3], [3]]


@pytest.mark.parametrize("how", ["data", "numpy"])
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_parameter_written_without_a_version_is_right_or_raises(policy, how):
    """The value from before the first call is lost; from the second call on, it is copied."""
    torch.manual_seed(0)
    blocks = [ReversibleBlock(Teacher(8, "parameter", how), mlp(8), split_dim=-1) for _ in range(3)]
    sequence = ReversibleSequential(*blocks, policy=policy)
    twin = stored_twin(sequence)
    x = torch.randn(16, 16)
    with pytest.raises(ReconstructionError, match="returned different numbers when it ran again"):
        backward(sequence, x)
    backward(twin, x)
    for _ in range(2):
        for module in (sequence, twin):
            module.zero_grad()
            backward(module, x)
        torch.testing.assert_close(gradients(sequence), gradients(twin), rtol=1e-4, atol=1e-6)


class ActNorm(nn.Module):
    """Initializes its parameters from the first batch."""

    def __init__(self, width, through_data):
        super().__init__()
        self.shift, self.log_scale = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.linear = nn.Linear(width, width)
        self.is_set, self.through_data = False, through_data

    def forward(self, x):
        if not self.is_set:
            self.is_set = True
            with torch.no_grad():
                shift, log_scale = -x.mean(0), -x.std(0).log()
                if self.through_data:
                    self.shift.data.copy_(shift)
                    self.log_scale.data.copy_(log_scale)
                else:
                    self.shift.copy_(shift)
                    self.log_scale.copy_(log_scale)
        return torch.tanh(self.linear((x + self.shift) * self.log_scale.exp()))


@pytest.mark.parametrize("through_data", [True, False])
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_parameters_initialized_in_the_first_forward_pass(policy, through_data):
    torch.manual_seed(0)
    blocks = [ReversibleBlock(ActNorm(8, through_data), ActNorm(8, through_data), split_dim=-1) for _ in range(3)]
    sequence = ReversibleSequential(*blocks, policy=policy).double()
    twin = stored_twin(sequence)
    x = torch.randn(16, 16, dtype=torch.float64)
    for _ in range(2):
        for module in (sequence, twin):
            module.zero_grad()
            backward(module, x)
        torch.testing.assert_close(gradients(sequence), gradients(twin))


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_function_that_writes_its_parameter_before_use(policy):
    """`nn.Embedding(max_norm=)` does this, and raises the version."""

    class Embedded(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.embedding = nn.Embedding(5, width, max_norm=0.5)
            self.inner = mlp(width)

        def forward(self, x, *, tokens):
            return self.inner(x + self.embedding(tokens))

    torch.manual_seed(0)
    blocks = [ReversibleBlock(Embedded(4), Embedded(4), split_dim=-1) for _ in range(3)]
    sequence = ReversibleSequential(*blocks, policy=policy).double()
    twin = stored_twin(sequence)
    x, tokens = torch.randn(6, 8, dtype=torch.float64), torch.arange(6) % 5
    for module in (sequence, twin):
        backward(module, x, tokens=tokens)
    torch.testing.assert_close(gradients(sequence), gradients(twin))
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_rejects_a_torch_jit_module_by_name(policy):
    """Its executor saves different tensors from run to run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated.
        scripted = torch.jit.script(mlp(4))
    sequence = ReversibleSequential(
        ReversibleBlock(mlp(4), nn.Sequential(scripted), split_dim=-1), ReversibleBlock(mlp(4), mlp(4), split_dim=-1)
    )
    set_policy(sequence, policy)
    with pytest.raises(NotImplementedError, match=r"`blocks\.0\.g` contains a module of `torch\.jit`"):
        sequence(torch.randn(3, 8))
    set_policy(sequence, Store())
    backward(sequence, torch.randn(3, 8))


@pytest.mark.parametrize("frozen_first", [True, False])
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)
def test_parameters_frozen_or_unfrozen_before_backward(policy, frozen_first):
    """A discriminator is frozen like this between the forward and the backward pass of a generator."""
    torch.manual_seed(0)
    sequence = mlp_stack(3, policy=policy).double().requires_grad_(not frozen_first)
    twin = stored_twin(sequence)
    results = []
    for module in (sequence, twin):
        x = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        loss = module(x).square().mean()
        module.requires_grad_(frozen_first)
        loss.backward()
        assert all(parameter.requires_grad == frozen_first for parameter in module.parameters())
        results.append([x.grad, *[parameter.grad for parameter in module.parameters() if parameter.grad is not None]])
    torch.testing.assert_close(*results)


# Lifetimes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint(), Offload(), Store()], ids=str)
def test_forward_pass_without_a_loss_is_freed(policy):
    """Without the help of the garbage collector."""
    sequence = mlp_stack(3, policy=policy)
    x = torch.randn(4, 16, requires_grad=True)
    with LiveBytes([]):  # The first dispatch mode of a process imports modules, whose frames refer to the frames below.
        backward(sequence, x)
    gc.collect()
    gc.disable()

    def runs():
        return sum(type(instance).__name__ in ("Rebuilder", "_KeepingRun") for instance in gc.get_objects())

    before = runs()  # Tracebacks of failed tests may keep some.
    try:
        with LiveBytes([x, *sequence.parameters()]) as counter:
            y = sequence(x)
            assert counter.live_bytes > 0
            del y
            assert counter.live_bytes == 0
        assert runs() == before
    finally:
        gc.enable()


def test_plan_keeps_no_parameter():
    sequence = mlp_stack(2)
    backward(sequence, torch.randn(2, 16))
    old = weakref.ref(sequence.blocks[0].f[0].weight)
    sequence.blocks[0].f[0].weight = nn.Parameter(torch.zeros(8, 8))
    gc.collect()
    assert old() is None


def test_set_policy_takes_effect_after_a_step():
    """The state that a sequence keeps from the last step is discarded when something changes."""
    sequence = mlp_stack(3)
    x = torch.randn(2, 16)
    expected = sequence(x)
    for policy in (Store(), Checkpoint(), Reverse()):
        set_policy(sequence, policy)
        assert torch.equal(sequence(x), expected)
        assert sequence.policies == (policy,) * 3
    sequence.blocks[1].f = nn.Identity()
    assert not torch.equal(sequence(x), expected)


def test_torch_func_error_names_the_alternatives():
    sequence = mlp_stack(2)
    with pytest.raises(RuntimeError, match=r"store the activations with `set_policy\(model, Store\(\)\)`"):
        torch.func.grad(lambda x: sequence(x).sum())(torch.randn(2, 16))


# PyTorch 2.11 warns when a profiler ends.
@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle")
def test_replays_are_named_in_a_profile():
    sequence = mlp_stack(2)
    x = torch.randn(2, 16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        backward(sequence, x)
    names = [event.name for event in profile.events() if event.name.startswith("revnet: ")]
    assert names == [f"revnet: replay blocks.{index}.{role}" for index in (1, 0) for role in "gf"]


class Recurrent(nn.Module):
    """A layer whose kernel saves a workspace, of which parts have no defined value."""

    def __init__(self, width):
        super().__init__()
        self.lstm = nn.LSTM(width, width, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


@pytest.mark.parametrize("policy", [Checkpoint(), Reverse(), Reverse(hold=True)], ids=str)
def test_a_workspace_is_not_compared(policy):
    blocks = [ReversibleBlock(Recurrent(6), Recurrent(6), split_dim=-1) for _ in range(2)]
    sequence = ReversibleSequential(*blocks, policy=policy)
    twin = stored_twin(sequence)
    x = torch.randn(3, 5, 12)
    for _ in range(3):
        loss = sequence(x).square().sum()
        rest = [torch.full((size,), 3e38) for size in range(7000, 7400, 3)]  # is in the memory of the next workspaces
        del rest
        loss.backward()
        twin(x).square().sum().backward()
    torch.testing.assert_close(gradients(sequence), gradients(twin), rtol=1e-4, atol=1e-5)
