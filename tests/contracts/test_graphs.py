"""Steps that are captured in a CUDA graph: they equal eager steps to the last bit."""

import copy

import pytest
import torch
from torch import nn

from revnet import (
    Additive,
    Checkpoint,
    FixedPoint,
    ReconstructionError,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
    Store,
)
from tests.contracts.test_gpu import DEVICE, random_states, to_device
from tests.helpers import CASE, DEPTH, ConvResidual, all_cases, gradients, leaves, mlp, squares

pytestmark = pytest.mark.gpu
NUM_WARMUPS = 3

all_rebuilding = pytest.mark.parametrize("policy", [Reverse(), Checkpoint()], ids=str)


@pytest.fixture(autouse=True)
def deterministic():
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


class Step:
    """Forward and backward pass on inputs that stay in place."""

    def __init__(self, module, inputs):
        self.module, self.inputs = module, to_device(inputs)

    def run(self):
        x, args, kwargs = self.inputs
        squares(self.module(x, *args, **kwargs)).backward()

    def clear(self):
        for tensor in (*self.module.parameters(), *leaves(self.inputs)):
            tensor.grad = None

    def outcome(self):
        """Return copies of all gradients and buffers, and the random states."""
        grads = [
            *gradients(self.module).values(),
            *[leaf.grad for leaf in leaves(self.inputs) if leaf.grad is not None],
        ]
        return [value.clone() for value in (*grads, *self.module.buffers())], random_states()


def warm_up(step):
    """Run eager steps on a stream of their own, as PyTorch's documentation of CUDA graphs advises."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for number in range(NUM_WARMUPS):
            step.clear()
            torch.manual_seed(number)
            step.run()
    torch.cuda.current_stream().wait_stream(stream)
    step.clear()


def captured(step):
    """Return a graph of the step, after eager steps."""
    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.run()
    return graph


def assert_replays_equal_eager_steps(module, inputs):
    twin = copy.deepcopy(module)
    step, eager = Step(module, inputs), Step(twin, inputs)
    graph = captured(step)
    warm_up(eager)
    for seed in (7, 8, 9):
        torch.manual_seed(seed)
        graph.replay()
        eager.clear()
        torch.manual_seed(seed)
        eager.run()
        values, states = step.outcome()
        expected, expected_states = eager.outcome()
        assert all(map(torch.equal, values, expected))
        assert all(map(torch.equal, states, expected_states))


def can_capture(module, inputs):
    """Return whether PyTorch can capture the functions at all."""
    try:
        captured(Step(module, inputs))
    except (RuntimeError, NotImplementedError):
        return False
    return True


@all_rebuilding
@all_cases
def test_replays_equal_eager_steps(case, policy):
    inputs = (case.input(), case.args(), case.kwargs())
    if not can_capture(case.sequence(DEPTH, Store()).to(DEVICE), inputs):
        pytest.skip("PyTorch cannot capture the functions of this case")
    assert_replays_equal_eager_steps(case.sequence(DEPTH, policy).to(DEVICE), inputs)


@all_rebuilding
@pytest.mark.parametrize("coupling", [Additive(), FixedPoint()], ids=str)
def test_batch_norm_and_dropout(policy, coupling):
    def function():
        return nn.Sequential(ConvResidual(8), nn.Dropout(0.3))

    blocks = [ReversibleBlock(function(), function(), coupling=coupling) for _ in range(4)]
    sequence = ReversibleSequential(*blocks, policy=policy).to(DEVICE)
    assert_replays_equal_eager_steps(sequence, (torch.randn(4, 16, 8, 8), (), {}))


def test_graphed_callables_equal_eager_steps():
    case = CASE["conv"]
    sequence = case.sequence(DEPTH).float().to(DEVICE)
    twin = copy.deepcopy(sequence)
    sample = case.input().float().to(DEVICE).detach().requires_grad_()
    graphed = torch.cuda.make_graphed_callables(sequence, (sample,))
    for _ in range(NUM_WARMUPS):  # as `make_graphed_callables` does
        twin(sample.detach().requires_grad_())
    twin.load_state_dict(sequence.state_dict())
    x = torch.randn_like(sample)
    squares(graphed(x.clone().requires_grad_())).backward()
    squares(twin(x.clone().requires_grad_())).backward()
    for (name, grad), expected in zip(gradients(sequence).items(), gradients(twin).values(), strict=True):
        assert torch.equal(grad, expected), name


@all_rebuilding
def test_dropout_in_graphed_callables_raises(policy):
    blocks = [ReversibleBlock(nn.Sequential(mlp(4), nn.Dropout(0.5)), mlp(4)) for _ in range(2)]
    sequence = ReversibleSequential(*blocks, policy=policy).to(DEVICE)
    with pytest.raises(ReconstructionError, match="in another CUDA graph"):
        torch.cuda.make_graphed_callables(sequence, (torch.randn(2, 8, device=DEVICE, requires_grad=True),))
