"""Streams of any kind: pairs, views, other memory formats, empty ones, and streams that are used elsewhere as well."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet import ReversibleBlock, ReversibleSequential
from tests.helpers import (
    CASE,
    DEPTH,
    all_cases,
    all_policies,
    assert_close,
    assert_same_buffers,
    assert_trains_as_twin,
    gradients,
    mlp,
    squares,
    stored_twin,
)


@all_cases
def test_streams_give_the_result_of_their_concatenation(case):
    sequence = case.sequence(2)
    twin = stored_twin(sequence)
    dim, num_streams = sequence[0].split_dim, sequence[0].num_streams
    x, args, kwargs = case.input(), case.args(), case.kwargs()
    torch.manual_seed(1)
    expected = twin(x, *args, **kwargs)
    streams = tuple(part.detach().clone().requires_grad_() for part in x.chunk(num_streams, dim))
    torch.manual_seed(1)
    y = sequence(streams, *args, **kwargs)
    assert torch.equal(torch.cat(y, dim), expected)

    sum((index + 1) * squares(stream) for index, stream in enumerate(y)).backward()
    sum((index + 1) * squares(part) for index, part in enumerate(expected.chunk(num_streams, dim))).backward()
    assert_close(torch.cat([stream.grad for stream in streams], dim), x.grad)


@all_cases
def test_inverse_returns_the_input_and_keeps_the_buffers(case):
    sequence = case.sequence(DEPTH).eval()
    x, args, kwargs = case.input(), case.args(), case.kwargs()
    y = sequence(x, *args, **kwargs)
    buffers = [buffer.clone() for buffer in sequence.buffers()]
    assert_close(sequence.inverse(y, *args, **kwargs), x)
    assert all(torch.equal(now, before) for now, before in zip(sequence.buffers(), buffers, strict=True))


def test_inverse_in_training_uses_the_batch_and_keeps_the_statistics():
    case = CASE["conv"]
    sequence = case.sequence(DEPTH)
    x = case.input()
    y = sequence(x)
    buffers = [buffer.clone() for buffer in sequence.buffers()]
    assert_close(sequence.inverse(y), x)
    assert all(torch.equal(now, before) for now, before in zip(sequence.buffers(), buffers, strict=True))


@all_cases
def test_inverse_is_differentiable(case):
    if case.name == "recurrent":
        pytest.skip("PyTorch's fused GRU has no gradient in evaluation mode")
    sequence = case.sequence(2).eval()
    args, kwargs = case.args(), case.kwargs()
    y = case.input()
    x = sequence.inverse(y, *args, **kwargs)
    (grad,) = torch.autograd.grad(squares(sequence(x, *args, **kwargs)), y)
    assert_close(grad, 2 * y, tolerance=1e-8)


@all_policies
@all_cases
def test_streams_used_elsewhere(case, policy):
    """A skip connection around the sequence, an activation before it, and an output that is used twice."""

    def step(module, x, args, kwargs):
        x = x * (x.real.relu() + 0.1)  # No exact zeros: rebuilt, they may lie on either side of a ReLU's kink.
        y = module(x, *args, **kwargs)
        squares(x + y * y.tanh()).backward()

    assert_trains_as_twin(case.sequence(DEPTH, policy), case, step)


VIEWS = {
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.stack((x, -x), -1)[..., 0],
    "reversed": lambda x: x.flip(0).contiguous().flip(0),
    "expanded batch": lambda x: x[:1].expand_as(x),
    "expanded whole": lambda x: x.sum().expand_as(x),
    "part of a larger tensor": lambda x: torch.cat((x, x))[1 : 1 + len(x)],
    "some features": lambda x: torch.cat((x, -x), -1)[..., : x.shape[-1]],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("as_pair", [False, True], ids=["tensor", "pair"])
@pytest.mark.parametrize("name", ["mlp", "attention", "transposed", "averaging", "nested-arguments", "complex"])
def test_views(name, as_pair, view):
    """Without batch norm: on copies of one sample it yields noise, which each function amplifies a thousandfold."""
    case = CASE[name]

    def step(module, x, args, kwargs):
        if as_pair:
            y = module(tuple(view(half) for half in x.chunk(2, module[0].split_dim)), *args, **kwargs)
            (squares(y[0]) + 2 * squares(y[1])).backward()
        else:
            squares(module(view(x), *args, **kwargs)).backward()

    # On equal features, a layer norm yields noise too, amplified by 1 / sqrt(eps), or 300.
    assert_trains_as_twin(case.sequence(2), case, step, tolerance=1e-7)


class ComputedWeight(nn.Module):
    """Runs another operator on a tensor with gaps, which saves the same shapes in another order."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(8, 8) / 3), nn.Parameter(torch.rand(8, 1))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias).tanh()


@all_policies
@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_layout_is_the_same_when_a_function_runs_again(policy, view):
    blocks = [ReversibleBlock(ComputedWeight(), ComputedWeight(), split_dim=-1) for _ in range(4)]
    sequence = ReversibleSequential(*blocks, policy=policy).double()
    twin = stored_twin(sequence)
    streams = [torch.randn(2, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    results = []
    for module in (sequence, twin):
        y1, y2 = module(tuple(map(view, streams)))
        grads = torch.autograd.grad(squares(y1) + 2 * squares(y2), [*streams, *module.parameters()])
        results.append([y1, y2, *grads])
    assert_close(*results)
    assert torch.equal(results[0][0], results[1][0])


def test_one_tensor_as_both_streams():
    def step(module, x, args, kwargs):
        half = x[:, :3]
        y1, y2 = module((half, half), *args, **kwargs)
        (squares(y1) + 2 * squares(y2)).backward()

    assert_trains_as_twin(CASE["mlp"].sequence(3), CASE["mlp"], step)


@pytest.mark.parametrize("first", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("second", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(first, second):
    """Memory formats of parameters and of streams; each stream keeps its own."""

    def step(module, x, args, kwargs):
        x1, x2 = x.chunk(2, 1)
        y = module((x1.contiguous(memory_format=first), x2.contiguous(memory_format=second)))
        assert y[0].is_contiguous(memory_format=first)
        assert y[1].is_contiguous(memory_format=second)
        squares(torch.cat(y)).backward()

    sequence = CASE["conv"].sequence(3)
    assert_trains_as_twin(sequence, CASE["conv"], step)
    sequence.zero_grad()
    assert_trains_as_twin(sequence.to(memory_format=torch.channels_last), CASE["conv"], step)


def test_channels_last_stays_channels_last():
    sequence = CASE["conv"].sequence(3).to(memory_format=torch.channels_last)

    def step(module, x, args, kwargs):
        y = module(x.contiguous(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
        squares(y).backward()

    assert_trains_as_twin(sequence, CASE["conv"], step)


@pytest.mark.parametrize("train", [True, False])
def test_empty_batch(train):
    case = CASE["attention" if train else "conv"]
    sequence = case.sequence(2).train(train)
    x = torch.randn(0, *case.shape[1:], dtype=torch.float64, requires_grad=True)
    y = sequence(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert all(not parameter.grad.any() for parameter in sequence.parameters())


def test_streams_without_channels():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            return torch.tanh(self.scale * x)

    sequence = ReversibleSequential(ReversibleBlock(Whole(), Whole()), ReversibleBlock(Whole(), Whole()))
    x = torch.randn(4, 0, requires_grad=True)
    y = sequence(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (4, 0)
    assert [parameter.grad.item() for parameter in sequence.parameters()] == [0, 0, 0, 0]


def test_sequence_without_blocks():
    sequence = ReversibleSequential()
    x = torch.randn(4, 6, requires_grad=True)
    y = sequence(x)
    y.square().sum().backward()
    assert torch.equal(y, x)
    assert torch.equal(x.grad, 2 * x)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_rejects_integers(dtype):
    sequence = CASE["mlp"].sequence(2)
    x = torch.ones(4, 6, dtype=dtype)
    with pytest.raises(TypeError, match=rf"`x` has dtype {dtype}, but a stream must be floating-point.*x\.float\(\)"):
        sequence(x)
    with pytest.raises(TypeError, match=rf"`x2` has dtype {dtype}"):
        sequence((torch.ones(4, 3), x[:, :3]))


def test_streams_of_different_dtypes():
    """A float32 stream with a float64 stream; each keeps its dtype."""

    class Cast(nn.Module):
        def __init__(self, dtype):
            super().__init__()
            self.inner, self.dtype = mlp(3).to(dtype), dtype

        def forward(self, x):
            return self.inner(x.to(self.dtype))

    sequence = ReversibleSequential(
        *[ReversibleBlock(Cast(torch.float32), Cast(torch.float64)) for _ in range(3)],
    )
    twin = stored_twin(sequence)
    x = (torch.randn(4, 3), torch.randn(4, 3, dtype=torch.float64))
    for module in (sequence, twin):
        y1, y2 = module(x)
        assert (y1.dtype, y2.dtype) == (torch.float32, torch.float64)
        (squares(y1) + squares(y2)).backward()
    assert_close(gradients(sequence), gradients(twin), tolerance=1e-4)


def test_nan_and_inf_pass_through_as_in_the_twin():
    sequence = CASE["mlp"].sequence(2)
    twin = stored_twin(sequence)
    x = CASE["mlp"].input(requires_grad=False)
    x[0, 0], x[1, 1] = float("nan"), float("inf")
    for module in (sequence, twin):
        module(x).sum().backward()
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad.isnan(), expected.grad.isnan())


def test_deepcopy_and_state_dict_after_a_step():
    case = CASE["conv"]
    sequence = case.sequence(2)
    squares(sequence(case.input())).backward()
    other = copy.deepcopy(sequence)
    other.load_state_dict(sequence.state_dict())
    assert_same_buffers(other, sequence)
    x = case.input()
    assert torch.equal(sequence.eval()(x), other.eval()(x))
