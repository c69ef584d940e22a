"""Held streams and kept outputs: what is not run again, what is never kept, and the bytes."""

import re
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from revnet import ReconstructionError, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.engine import _keep
from revnet.memory import measure, predict
from revnet.nn import BatchNorm2dBiased
from tests.helpers import ConvResidual, assert_close, gradients, keep_all, right_or_raises, squares, stored_twin

aten = torch.ops.aten
NUM_BLOCKS = 3
CONVOLUTIONS = (aten.convolution.default,)
PRODUCTS = (aten.addmm.default, aten.mm.default)


def name_of(value):
    """Return the same name in each process, for the name of a test."""
    return re.sub(r"<function (\w+) at \w+>", r"\1", str(value))


class Perceptron(nn.Module):
    def __init__(self, dim: int = 8):
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(self.norm(x))))


class Attention(nn.Module):
    def __init__(self, dim: int = 8, dropout: float = 0.0):
        super().__init__()
        self.inner, self.outer, self.dropout = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.inner(x).chunk(3, -1)]
        return self.outer(F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout).transpose(1, 2).flatten(2))


def convolutions(policy):
    blocks = [ReversibleBlock(ConvResidual(4), ConvResidual(4)) for _ in range(NUM_BLOCKS)]
    return ReversibleSequential(*blocks, policy=policy).double()


def transformer(policy, dropout=0.0):
    blocks = [ReversibleBlock(Attention(dropout=dropout), Perceptron(), split_dim=-1) for _ in range(NUM_BLOCKS)]
    return ReversibleSequential(*blocks, policy=policy).double()


INPUTS = {convolutions: (2, 8, 6, 6), transformer: (2, 5, 16)}


class Counts(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self):
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func] += 1
        return func(*args, **(kwargs or {}))


def num_replayed(make, policy, operators):
    """Return how many calls of these operators a step makes in addition to the forward pass."""
    counts = []
    for with_backward in (False, True):
        module, x = make(policy), torch.randn(INPUTS[make], dtype=torch.float64)
        with Counts() as mode:
            loss = module(x).sum()
        forward = Counter(mode.calls)
        if with_backward:
            with Counts() as mode:
                loss.backward()
        counts.append(sum(mode.calls[operator] for operator in operators))
        del forward
    return counts[1]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # Two convolutions for each function; the lowest function stops before its last one.
        (Reverse(), 4 * NUM_BLOCKS - 1),
        # Each `g` but the last updates a stream that an `f` has read, and stops early; so does the lowest `f`.
        (Reverse(hold="f"), 4 * NUM_BLOCKS - 1 - NUM_BLOCKS),
        (Reverse(hold="g"), 4 * NUM_BLOCKS - 1 - (NUM_BLOCKS - 1)),
        (Reverse(hold=True), 2 * NUM_BLOCKS),
        (Reverse(keep="convolution"), 0),
        (Reverse(keep="f.convolution"), 2 * NUM_BLOCKS),
        (Reverse(keep="convolution.0"), 2 * NUM_BLOCKS - 1),
        (Reverse(hold=True, keep="g.convolution"), NUM_BLOCKS),
        (Reverse(keep=aten.convolution), 0),
        (Reverse(keep=[aten.convolution.default]), 0),
        (Reverse(keep=keep_all), 0),
        (Reverse(keep="1GiB"), 0),
        (Reverse(keep=2 * 4 * 6 * 6 * 8), 4 * NUM_BLOCKS - 2),
        (Reverse(keep=1), 4 * NUM_BLOCKS - 1),
    ],
    ids=name_of,
)
def test_kept_operators_do_not_run_again(policy, expected):
    assert num_replayed(convolutions, policy, CONVOLUTIONS) == expected


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ((), 4 * NUM_BLOCKS - 1),
        ("linear", 0),
        (("g.linear.0", "f.linear"), NUM_BLOCKS),
        ([aten.linear], 0),
        (aten.addmm, 0),
    ],
    ids=name_of,
)
def test_linear_layers_do_not_run_again(keep, expected):
    forward = num_replayed(transformer, Store(), PRODUCTS)
    assert num_replayed(transformer, Reverse(keep=keep), PRODUCTS) - forward == expected


def test_attention_does_not_run_again():
    operators = (aten._scaled_dot_product_flash_attention_for_cpu.default,)
    assert num_replayed(transformer, Reverse(), operators) == NUM_BLOCKS
    for keep in ("attention", "f.attention.0", aten.scaled_dot_product_attention):
        assert num_replayed(transformer, Reverse(keep=keep), operators) == 0


def gradients_and_twin(sequence, shape, num_calls=1):
    twin = stored_twin(sequence)
    results = []
    for module in (sequence, twin):
        torch.manual_seed(3)
        x = torch.randn(shape, dtype=torch.float64)
        for _ in range(num_calls):
            module(x).sin().sum().backward()
        results.append(gradients(module))
    return results


@pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)
def test_held_streams_are_exact(make):
    sequence = make(Reverse(hold=True))
    twin = stored_twin(sequence)
    x = torch.randn(INPUTS[make], dtype=torch.float64)
    for module in (sequence, twin):
        module(x).sin().sum().backward()
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


@pytest.mark.parametrize(
    "policy", [Reverse(keep=keep_all), Reverse(hold="f", keep="attention")], ids=["all", "attention"]
)
def test_operators_with_dropout_run_again(policy):
    assert_close(*gradients_and_twin(transformer(policy, dropout=0.3), INPUTS[transformer]))


class WritesToProduct(nn.Module):
    """Writes to the result of a matrix product through a view, whose version counter is not the result's own.

    `torch.utils.checkpoint` with selective checkpointing returns a wrong gradient for it.
    """

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin((x @ self.weight).mul_(2)) @ self.weight


@pytest.mark.parametrize("keep", ["linear", aten.mm, keep_all], ids=["linear", "mm", "all"])
def test_output_that_is_written_to_is_not_kept(keep):
    blocks = [ReversibleBlock(WritesToProduct(), WritesToProduct(), split_dim=-1) for _ in range(2)]
    sequence = ReversibleSequential(*blocks, policy=Reverse(keep=keep)).double()
    assert_close(*gradients_and_twin(sequence, (2, 3, 8)))


class WritesLater(nn.Module):
    """Returns a product, to which a hook writes after the function has returned."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.output = self.linear(x)
        return self.output * 2


def test_output_that_is_written_to_later_is_not_used():
    blocks = [ReversibleBlock(WritesLater(), WritesLater()) for _ in range(2)]
    sequence = ReversibleSequential(*blocks, policy=Reverse(keep="linear")).double()
    twin = stored_twin(sequence)
    x = torch.randn(3, 8, dtype=torch.float64)
    for module in (sequence, twin):
        loss = module(x).sin().sum()
        with torch.no_grad():
            for block in module.blocks:
                block.f.output.zero_()
        loss.backward()
    assert_close(gradients(sequence), gradients(twin))


class PartlyCompiled(nn.Module):
    """Calls compiled code, whose kernels write to outputs of operators without calling an operator."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.compile(compiled_part)(self.conv(x), self.conv.weight))


def compiled_part(x: Tensor, weight: Tensor) -> Tensor:
    # The hyperbolic tangent is written over the output of the first convolution.
    return F.conv2d(F.conv2d(x, weight, padding=1).tanh(), weight, padding=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "policy", [Reverse(keep=keep_all), Reverse(hold=True, keep="convolution")], ids=["all", "conv"]
)
def test_outputs_in_compiled_code_are_not_kept(policy):
    torch._dynamo.reset()
    blocks = [ReversibleBlock(PartlyCompiled(), PartlyCompiled()) for _ in range(2)]
    assert_close(*gradients_and_twin(ReversibleSequential(*blocks, policy=policy).double(), (2, 4, 4, 4)))


class ComputesInside(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight).mul_(2)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return 2 * grad @ weight.t(), 2 * x.t() @ grad


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return ComputesInside.apply(ComputesInside.apply(x, self.weight).sin(), self.weight)


def test_outputs_in_custom_functions_are_not_kept():
    blocks = [ReversibleBlock(Custom(), Custom()) for _ in range(2)]
    sequence = ReversibleSequential(*blocks, policy=Reverse(keep=keep_all)).double()
    assert_close(*gradients_and_twin(sequence, (3, 8)))


class Alternates(nn.Module):
    """Takes another path when it runs again."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        if self.num_calls % 2:
            return self.second(self.first(x).tanh().sin())
        return self.second(self.first(x).sin())


def test_another_path_raises():
    blocks = [ReversibleBlock(Alternates(), Alternates()) for _ in range(2)]
    sequence = ReversibleSequential(*blocks, policy=Reverse(keep="linear")).double()
    loss = sequence(torch.randn(3, 8, dtype=torch.float64)).sum()
    with pytest.raises(ReconstructionError, match=r"did something else when it ran again: it called `aten\.addmm"):
        loss.backward()


def test_held_stream_that_was_written_to_raises():
    x1, x2 = torch.randn(2, 4), torch.randn(2, 4)
    sequence = ReversibleSequential(*[ReversibleBlock(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)])
    sequence.set_policies([Reverse(hold="f")] * 2)
    loss = sum(y.sum() for y in sequence((x1, x2)))
    x2.zero_()
    with pytest.raises(ReconstructionError, match=r"the stream that `blocks.0.f` read, of shape \(2, 4\)"):
        loss.backward()


@pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)
def test_each_held_stream_and_output_is_counted(make):
    x = torch.randn(INPUTS[make], dtype=torch.float64)
    stream, inner = x.nbytes // 2, x.nbytes if make is transformer else x.nbytes // 2
    held = {policy: measure(make(policy), x).held_bytes for policy in (Reverse(), Reverse(hold="f"), Reverse(hold="g"))}
    assert held[Reverse(hold="f")] - held[Reverse()] == NUM_BLOCKS * stream
    # The last `g` reads a final stream, which is held anyway.
    assert held[Reverse(hold="g")] - held[Reverse()] == (NUM_BLOCKS - 1) * stream
    keep = "g.linear.0" if make is transformer else "g.convolution.0"
    assert measure(make(Reverse(keep=keep)), x).held_bytes - held[Reverse()] == NUM_BLOCKS * inner


@pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    "policy", [Reverse(hold="f"), Reverse(keep=keep_all), Reverse(hold=True, keep="1KiB")], ids=name_of
)
def test_prediction_equals_the_count(make, policy):
    module, x = make(policy), torch.randn(INPUTS[make], dtype=torch.float64)
    assert predict(module, x).peak_bytes == measure(module, x).peak_bytes


def test_neighbors_that_keep_different_things_form_one_chain():
    """Otherwise, each of them would hold its final streams."""
    policies = [Reverse(hold="f"), Reverse(), Reverse(keep="linear")]
    assert len(transformer(policies)._schedule().segments) == 1
    assert len(transformer([*policies[:2], Store()])._schedule().segments) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep": "conv"}, ValueError, "'conv'.*'convolution', 'linear', 'attention'"),
        ({"keep": "g.linear.x"}, ValueError, "'g.linear.x'"),
        ({"keep": aten.einsum}, ValueError, "replaces by other operators"),
        ({"keep": "64 parsecs"}, ValueError, "number of bytes"),
        ({"keep": 0}, ValueError, "positive"),
        ({"keep": 1.5}, TypeError, "1.5"),
        ({"keep": [3]}, TypeError, "must be an operator"),
        ({"hold": 3}, TypeError, "3"),
        ({"hold": [""]}, TypeError, "names of residual functions"),
    ],
    ids=name_of,
)
def test_rejects_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        Reverse(**arguments)


@pytest.mark.parametrize("policy", [Reverse(hold="h"), Reverse(keep="h.linear")], ids=name_of)
def test_rejects_functions_that_a_block_does_not_have(policy):
    message = r"names the residual function 'h', but the block of `blocks.0.f` has 'f', 'g'"
    with pytest.raises(ValueError, match=message):
        transformer(policy)(torch.randn(2, 5, 16, dtype=torch.float64))


def test_policies_compare_and_print_by_their_arguments():
    policy = Reverse(hold="f, g", keep="g.linear.0, f.attention")
    assert policy == Reverse(hold=["f", "g"], keep=("g.linear.0", "f.attention"))
    assert eval(repr(policy)) == policy
    assert repr(Reverse(hold=True, keep="64MiB")) == "Reverse(hold=True, keep='64MiB')"
    assert len({policy, Reverse(), Reverse(hold=())}) == 2


class Remembers(nn.Module):
    """Attention over frozen projections, with a table that is projected once and then remembered."""

    def __init__(self, is_trained: bool):
        super().__init__()
        self.query, self.key, self.value, self.relative = [nn.Linear(8, 8, bias=False) for _ in range(4)]
        self.requires_grad_(False)
        self.relative.requires_grad_(is_trained)
        self.gate = nn.Parameter(torch.randn(8))
        self.table, self.cache = nn.Buffer(torch.randn(5, 8)), None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = torch.sigmoid(self.relative(self.table))
        q, k, v = [torch.sigmoid(layer(x)) for layer in (self.query, self.key, self.value)]
        return (q @ (k + self.cache).mT).softmax(-1) @ v * self.gate


@pytest.mark.parametrize("is_trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("keep", ["linear", aten.sigmoid, "64MiB", keep_all], ids=["linear", "sigmoid", "bytes", "all"])
def test_a_function_that_fills_a_cache_is_right_or_raises(keep, is_trained):
    blocks = [ReversibleBlock(Remembers(is_trained), Remembers(is_trained), split_dim=-1) for _ in range(NUM_BLOCKS)]
    sequence = ReversibleSequential(*blocks, policy=Reverse(hold=True, keep=keep))
    twin = stored_twin(sequence)
    x = torch.randn(1, 5, 16, requires_grad=True)
    squares(twin(x)).backward()
    with right_or_raises("did something else when it ran again") if is_trained else nullcontext():
        squares(sequence(x)).backward()
        for name, expected in gradients(twin).items():
            assert expected is None or torch.equal(gradients(sequence)[name], expected)


@pytest.mark.parametrize("keep", ["convolution", "linear"])
def test_dropout_of_everything(keep):
    functions = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(1.0), nn.Linear(4, 4)) for _ in range(2 * NUM_BLOCKS)]
    blocks = [ReversibleBlock(f, g, split_dim=-1) for f, g in zip(functions[::2], functions[1::2], strict=True)]
    sequence = ReversibleSequential(*blocks, policy=Reverse(keep=keep))
    loss = squares(sequence(torch.randn(3, 8, requires_grad=True)))
    loss.backward(retain_graph=True)
    first = gradients(sequence)
    assert all(torch.isfinite(gradient).all() for gradient in first.values())
    loss.backward()


def called_twice(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [module(x), module(x + 1)]
    squares(torch.stack(outputs).float()).backward()


def backward_inside(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        squares(module(x).float()).backward()


def called_once(module, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    squares(y.float()).backward()


@pytest.mark.parametrize("is_shared", [False, True], ids=["own-functions", "shared-functions"])
@pytest.mark.parametrize("step", [called_twice, backward_inside, called_once])
@pytest.mark.parametrize("keep", [keep_all, aten._to_copy], ids=["all", "casts"])
def test_autocast_casts_weights_at_other_times(keep, step, is_shared):
    """A weight is cast in one of the two runs and comes from the cache of autocast in the other."""

    def residual():
        return nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))

    functions = [(residual(), residual())] * NUM_BLOCKS if is_shared else [(residual(), residual()) for _ in range(3)]
    blocks = [ReversibleBlock(f, g) for f, g in functions]
    sequence = ReversibleSequential(*blocks, policy=Reverse(hold=True, keep=keep))
    twin = stored_twin(sequence)
    x = torch.randn(8, 16)
    for module in (sequence, twin):
        step(module, x)
    for name, expected in gradients(twin).items():
        assert torch.equal(gradients(sequence)[name], expected)


def test_running_statistics_are_averaged_outside_of_the_mode(monkeypatch):
    """Each operator that the mode sees costs some microseconds. The statistics are the same."""
    seen = Counter()
    dispatch = _keep._Keeping.__torch_dispatch__

    def count(self, func, *rest):
        seen[func] += 1
        return dispatch(self, func, *rest)

    monkeypatch.setattr(_keep._Keeping, "__torch_dispatch__", count)
    f, g = [nn.Sequential(BatchNorm2dBiased(4), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2)]
    sequence = ReversibleSequential(ReversibleBlock(f, g), policy=Reverse(keep="convolution")).double()
    twin = stored_twin(sequence)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    for module in (sequence, twin):
        module(x).sum().backward()
    assert seen[aten.convolution.default] == 2
    assert seen[aten.lerp_.Tensor] == 0
    for buffer, expected in zip(sequence.buffers(), twin.buffers(), strict=True):
        assert torch.equal(buffer, expected)
