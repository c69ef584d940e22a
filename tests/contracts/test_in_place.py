"""Writes to tensors between forward and backward: harmless if nothing reads the tensor again, an error otherwise."""

import pytest
import torch
from torch import nn

from revnet import ReconstructionError, Reverse, ReversibleBlock, ReversibleSequential, Store
from tests.helpers import (
    CASE,
    all_cases,
    assert_close,
    assert_trains_as_twin,
    mlp,
    right_or_raises,
    squares,
    stored_twin,
)


@all_cases
def test_input_modified_after_forward_is_harmless(case):
    """The input is not kept, so this works even where plain autograd must raise."""

    def step(module, x, args, kwargs):
        start = x.clone()
        y = module(start, *args, **kwargs)
        if type(module.policies[0]) is Reverse:
            start.detach().zero_()
        squares(y).backward()

    assert_trains_as_twin(case.sequence(2), case, step)


def test_streams_of_a_pair_modified_after_forward_are_harmless():
    def step(module, x, args, kwargs):
        x1, x2 = (half.clone() for half in x.chunk(2, 1))
        y1, y2 = module((x1, x2))
        if type(module.policies[0]) is Reverse:
            x1.detach().zero_()
            x2.detach().zero_()
        (squares(y1) + 2 * squares(y2)).backward()

    assert_trains_as_twin(CASE["conv"].sequence(2), CASE["conv"], step)


@all_cases
def test_input_modified_before_forward(case):
    """An in-place activation just before the blocks modifies the input."""

    def step(module, x, args, kwargs):
        squares(module((x * 2).add_(1).tanh_(), *args, **kwargs)).backward()

    assert_trains_as_twin(case.sequence(2), case, step)


TOUCHES = {
    "activation": lambda y: y.relu_(),
    "part": lambda y: y[:, :1].zero_(),
    "detached": lambda y: y.detach().add_(1),
    "data written": lambda y: y.detach().copy_(torch.zeros_like(y)),
    "filled": lambda y: torch.nn.init.zeros_(y),
}


@pytest.mark.parametrize("touch", TOUCHES.values(), ids=TOUCHES.keys())
@pytest.mark.parametrize("name", ["conv", "mlp", "tied"])
def test_output_modified_before_backward_raises(name, touch):
    sequence = CASE[name].sequence(2)
    y = sequence(CASE[name].input())
    loss = y.sum()
    touch(y)
    with pytest.raises(ReconstructionError, match="modified by an inplace operation: an output"):
        loss.backward()
    assert all(parameter.grad is None for parameter in sequence.parameters())


@pytest.mark.parametrize("index", [0, 1])
def test_output_of_a_pair_modified_before_backward_raises(index):
    sequence = CASE["mlp"].sequence(2)
    y = sequence(CASE["mlp"].input().chunk(2, 1))
    loss = y[0].sum() + y[1].sum()
    y[index].detach().add_(1)
    with pytest.raises(ReconstructionError, match=r"an output of a reversible sequence, of shape \(4, 3\)"):
        loss.backward()


@pytest.mark.parametrize("as_pair", [False, True], ids=["tensor", "pair"])
def test_output_modified_between_two_backward_passes_is_right_or_raises(as_pair):
    """After the first pass, the second may have nothing left to read from the output."""
    sequence = CASE["mlp"].sequence(3)
    x = CASE["mlp"].input()
    y = sequence(x.chunk(2, 1) if as_pair else x)
    loss = y[0].sum() + 2 * y[1].sum() if as_pair else y.sum()  # saves no tensor that autograd checks
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    for half in y if as_pair else (y,):
        half.detach().add_(1)
    with right_or_raises("modified by an inplace operation"):
        assert_close(torch.autograd.grad(loss, x)[0], first)


@all_cases
def test_copy_of_the_output_can_be_modified(case):
    def step(module, x, args, kwargs):
        y = module(x, *args, **kwargs)
        copy = y.clone()
        squares(copy.mul_(2)).backward()

    assert_trains_as_twin(case.sequence(2), case, step)


def test_output_can_be_modified_after_a_stored_last_block():
    """This is the remedy that the error suggests."""

    def step(module, x, args, kwargs):
        squares(module(x).relu_()).backward()

    assert_trains_as_twin(CASE["conv"].sequence(3, [Reverse(), Reverse(), Store()]), CASE["conv"], step)


def test_gradients_can_be_modified():
    """Hooks that clip in place see gradients, and never the engine's streams."""

    def step(module, x, args, kwargs):
        y = module(x)
        y.register_hook(lambda grad: grad.clamp_(-0.5, 0.5))
        x.register_hook(lambda grad: grad.mul_(2))
        squares(y).backward()

    assert_trains_as_twin(CASE["mlp"].sequence(3), CASE["mlp"], step)


@pytest.mark.parametrize("what", ["weight", "bias", "argument", "nested argument"])
def test_parameter_or_argument_modified_before_backward_raises(what):
    case = CASE["nested-arguments" if what == "nested argument" else "attention-context-mask"]
    sequence = case.sequence(2)
    args = case.args()
    loss = sequence(case.input(), *args, **case.kwargs()).sum()
    with torch.no_grad():
        if what == "argument":
            args[0].add_(1)
        elif what == "nested argument":
            args[0]["shifts"][1]["shift"].add_(1)
        else:
            getattr(sequence[0].g.layers[0], what).add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


def test_modified_parameter_raises_if_nothing_else_was_saved():
    """Frozen linear layers save only their weights, so no rebuilt tensor could reveal the change."""
    functions = [nn.Linear(3, 3).requires_grad_(False) for _ in range(4)]
    sequence = ReversibleSequential(ReversibleBlock(*functions[:2]), ReversibleBlock(*functions[2:]))
    loss = sequence(torch.randn(4, 6, requires_grad=True)).sum()
    functions[0].weight.add_(1)
    with pytest.raises(RuntimeError, match=r"argument of a residual function, of shape \(3, 3\), is at version 2"):
        loss.backward()


@pytest.mark.parametrize("name", ["conv", "averaging"])
def test_buffer_modified_before_backward_in_evaluation_raises(name):
    """In training, nothing reads the running statistics again; in evaluation, every replay does."""
    sequence = CASE[name].sequence(2).eval()
    loss = sequence(CASE[name].input()).sum()
    buffers = dict(sequence[0].f.named_buffers())
    buffers["written" if name == "averaging" else "norm1.running_mean"].add_(1)
    with pytest.raises(RuntimeError, match="modified"):
        loss.backward()


class WritesOver(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.inner, self.write = mlp(3), write

    def forward(self, x):
        return self.inner(self.write(x))


WRITES = {
    "activation": lambda x: x.relu_(),
    "part": lambda x: x[:, :1].zero_() + x,
    "detached": lambda x: x.detach().zero_() + x,
}


@pytest.mark.parametrize("policy", [Reverse(), Store()], ids=["reverse", "store"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("name", ["f", "g"])
def test_function_that_overwrites_its_input_raises(name, write, policy):
    functions = {"f": mlp(3), "g": mlp(3), name: WritesOver(write)}
    sequence = ReversibleSequential(ReversibleBlock(mlp(3), mlp(3)), ReversibleBlock(**functions), policy=policy)
    with pytest.raises(RuntimeError, match=rf"`blocks\.1\.{name}` modified its input in place.*inplace=False"):
        sequence(torch.randn(4, 6))


def test_function_can_overwrite_its_own_tensors():
    def block():
        function = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 3), nn.Hardtanh(inplace=True))
        return ReversibleBlock(function, mlp(3))

    sequence = ReversibleSequential(*[block() for _ in range(3)]).double()
    assert_trains_as_twin(sequence, CASE["mlp"], lambda module, x, *_: squares(module(x)).backward())


def test_function_that_returns_its_input():
    """The residual is a stream. Rebuilding must not subtract it from itself in place and corrupt the other stream."""
    sequence = ReversibleSequential(*[ReversibleBlock(nn.Identity(), mlp(3)) for _ in range(3)]).double()
    assert_trains_as_twin(sequence, CASE["mlp"], lambda module, x, *_: squares(module(x)).backward())


def test_function_that_returns_a_parameter_or_an_argument():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.constant = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return self.constant

    sequence = ReversibleSequential(*[ReversibleBlock(Constant(), mlp(3)) for _ in range(3)]).double()
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, dtype=torch.float64)
    for module in (sequence, twin):
        squares(module(x)).backward()
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert_close(parameter.grad, expected.grad)
        assert_close(parameter, expected)
