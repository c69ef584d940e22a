"""After an error, all state is unchanged: random state, flags, buffers, autocast, memory, and the next step."""

import gc

import pytest
import torch
from torch import nn

from revnet import Checkpoint, ReconstructionError, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.memory.step._live import LiveBytes
from tests.helpers import (
    CASE,
    all_policies,
    assert_close,
    assert_same_buffers,
    assert_trains_as_twin,
    gradients,
    mlp,
    squares,
    stored_twin,
)


class Faulty(nn.Module):
    """Draws random numbers, updates buffers, and fails on demand."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 3))
        self.register_buffer("count", torch.zeros(1, 1))
        self.fault = None

    def forward(self, x):
        self.count += 1
        y = self.inner(x) + 0 * self.count
        return y if self.fault is None else self.fault(y)


def fail(y):
    raise ArithmeticError("on demand")


def make_sequence(policy=None):
    blocks = [ReversibleBlock(Faulty(), Faulty()) for _ in range(4)]
    return ReversibleSequential(*blocks, policy=policy or Reverse()).double()


def observe(module):
    """Return the state that an error must not change."""
    return [
        torch.get_rng_state(),
        torch.tensor([child.training for child in module.modules()]),
        torch.tensor([torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()]),
        *[buffer.clone() for buffer in module.buffers()],
    ]


def assert_next_step_is_right(sequence, twin, x):
    twin.load_state_dict(sequence.state_dict())
    for module in (sequence, twin):
        module.zero_grad()
        torch.manual_seed(5)
        squares(module(x)).backward()
    assert_close(gradients(sequence), gradients(twin))
    assert_same_buffers(sequence, twin)


PLACES = ["0.f", "0.g", "1.f", "2.g", "3.g"]
WRONG = {
    "shape": (lambda y: y[:, :1], ValueError, r"returned shape \(4, 1\), but must return the shape of the stream"),
    "rank": (lambda y: y[None], ValueError, r"returned shape \(1, 4, 3\), but must"),
    "dtype": (lambda y: y.to(torch.complex128), TypeError, r"returned torch.complex128, but the stream .* is torch.fl"),
    "tuple": (lambda y: (y, y), TypeError, "returned tuple of 2, but must return one tensor"),
    "list": (lambda y: [y], TypeError, "returned list of 1, but must return one tensor"),
    "dict": (lambda y: {"y": y}, TypeError, "returned dict, but must return one tensor"),
    "none": (lambda y: None, TypeError, "returned NoneType, but must return one tensor"),
    "number": (lambda y: 1.0, TypeError, "returned float, but must return one tensor"),
    "exception": (fail, ArithmeticError, "on demand"),
}


@all_policies
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_error_in_forward(wrong, place, policy):
    fault, error, message = wrong
    sequence = make_sequence(policy)
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, dtype=torch.float64)
    function = sequence.get_submodule(f"blocks.{place}")
    function.fault = fault
    torch.manual_seed(1)
    with pytest.raises(error, match=message if error is ArithmeticError else rf"`blocks\.{place}` {message}"):
        sequence(x)
    after = [torch.get_rng_state(), *sequence.buffers()]

    function.fault = None
    # The functions before the fault have drawn and counted, as in the twin.
    twin_function = twin.get_submodule(f"blocks.{place}")
    twin_function.fault = fault
    torch.manual_seed(1)
    with pytest.raises(error):
        twin(x)
    twin_function.fault = None
    for value, expected in zip(after, [torch.get_rng_state(), *twin.buffers()], strict=True):
        assert torch.equal(value, expected)
    assert_next_step_is_right(sequence, twin, x)


@all_policies
def test_unneeded_layers_are_not_recomputed(policy):
    """The last layer of a function whose residual is not needed: the lowest function, and every function of a
    checkpoint."""
    sequence = make_sequence(policy)
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, dtype=torch.float64)
    unneeded = ["0.f", "1.f", "1.g", "3.g"] if policy == Checkpoint() else ["0.f"]
    torch.manual_seed(1)
    loss = squares(sequence(x))
    for place in unneeded:
        sequence.get_submodule(f"blocks.{place}").fault = fail
    loss.backward()
    torch.manual_seed(1)
    squares(twin(x)).backward()
    assert_close(gradients(sequence), gradients(twin))


@pytest.mark.parametrize("backward_mode", ["plain", "autocast", "no_grad"])
@pytest.mark.parametrize("place", PLACES[1:])
@pytest.mark.parametrize("kind", ["shape", "dtype", "exception"])
def test_error_in_a_replay(kind, place, backward_mode):
    fault, error, message = WRONG[kind]
    if kind != "exception":
        error, message = ReconstructionError, r"did something else when it ran again: it returned"
    sequence = make_sequence()
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(1)
    loss = squares(sequence(x))
    function = sequence.get_submodule(f"blocks.{place}")
    function.fault = fault
    sequence.eval()
    before = observe(sequence)
    context = {
        "plain": torch.enable_grad(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad(),
    }[backward_mode]
    with pytest.raises(error, match=message), context:
        loss.backward(retain_graph=True)
    for value, expected in zip(observe(sequence), before, strict=True):
        assert torch.equal(value, expected)

    # The same graph, once the fault is repaired.
    function.fault = None
    sequence.zero_grad()
    loss.backward()
    torch.manual_seed(1)
    squares(twin(x)).backward()
    assert_close(gradients(sequence), gradients(twin))
    assert_next_step_is_right(sequence.train(), twin, x)


@pytest.mark.parametrize("when", ["forward", "recomputation"])
@pytest.mark.parametrize("kind", ["shape", "exception"])
def test_nothing_leaks_after_an_error(when, kind):
    fault, error, _ = WRONG[kind]
    if (kind, when) == ("shape", "recomputation"):
        error = ReconstructionError
    sequence = make_sequence()
    x = torch.randn(4, 6, dtype=torch.float64)
    for parameter in sequence.parameters():
        parameter.grad = torch.zeros_like(parameter)
    keep = [x, *sequence.parameters(), *sequence.buffers(), *[p.grad for p in sequence.parameters()]]

    def step():
        sequence[1].g.fault = fault if when == "forward" else None
        try:
            loss = squares(sequence(x))
            sequence[1].g.fault = fault
            loss.backward()
        except error:
            return
        raise AssertionError("no error")

    with LiveBytes(keep) as counter:
        for _ in range(3):
            step()
        gc.collect()
        assert counter.live_bytes == 0


class Counting(nn.Module):
    """Takes a different path in each run."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x.tanh() if self.calls > 2 else x).sigmoid()


def test_function_that_does_not_repeat_itself_raises():
    sequence = ReversibleSequential(ReversibleBlock(Counting(), Counting()), ReversibleBlock(Counting(), Counting()))
    for block in sequence:
        block.f.calls = block.g.calls = 2
    loss = sequence(torch.randn(2, 6)).sum()
    for block in sequence:
        block.f.calls = block.g.calls = -10
    with pytest.raises(ReconstructionError, match=r"`blocks\.1\.g` did something else when it ran again.*Store"):
        loss.backward()


def test_backward_called_within_a_residual_function_raises():
    """Backward through the graph under construction raises; backward through another graph works."""

    class Backward(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp(3)

        def forward(self, x):
            y = self.inner(x)
            if torch.is_grad_enabled() and x.requires_grad:
                x.sum().backward(retain_graph=True)
            return y

    sequence = ReversibleSequential(*[ReversibleBlock(mlp(3), Backward()) for _ in range(2)])
    with pytest.raises(RuntimeError, match="whose forward pass has not finished; call `backward` outside"):
        sequence(torch.randn(4, 6, requires_grad=True))


def test_interrupted_backward_can_be_repeated():
    """An error in a hook of the caller, in the middle of the backward pass."""
    case = CASE["conv-dropout"]

    def step(module, x, args, kwargs):
        def interrupt(grad):
            raise KeyboardInterrupt

        handle = module[1].f[0].conv1.weight.register_hook(interrupt)
        loss = squares(module(x))
        with pytest.raises(KeyboardInterrupt):
            loss.backward(retain_graph=True)
        handle.remove()
        module.zero_grad()
        x.grad = None
        loss.backward()

    assert_trains_as_twin(case.sequence(3), case, step)


def test_error_under_store_has_the_same_message():
    for policy in (Reverse(), Store()):
        sequence = make_sequence(policy)
        sequence[2].f.fault = lambda y: None
        with pytest.raises(TypeError, match=r"`blocks\.2\.f` returned NoneType, but must return one tensor"):
            sequence(torch.randn(4, 6, dtype=torch.float64))
