"""Activation memory, in exact bytes: it does not grow with depth, and nothing remains allocated."""

import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from revnet import Checkpoint, Reverse, ReversibleBlock, ReversibleSequential, Store
from revnet.bench.cases import CASES
from revnet.engine import Chain, HalfBlock, reversible, stored
from revnet.memory import measure, predict
from revnet.memory.step._live import LiveBytes
from tests.helpers import SAMPLE, ConvResidual, mlp, stored_twin

# One stream is 1 MiB (conv) or 0.5 MiB (transformer).
CONV_STREAM = 8 * 32 * 32 * 32 * 4
TRANSFORMER_STREAM = 2 * 256 * 256 * 4
STATISTICS = 2 * 2 * 2 * 32 * 4
"""Bytes of the statistics that a block of two functions with two batch norms each keeps: two numbers per channel."""


def conv_stack(depth, policy=None):
    blocks = [ReversibleBlock(ConvResidual(32), ConvResidual(32)) for _ in range(depth)]
    return ReversibleSequential(*blocks, policy=policy or Reverse())


def transformer_stack(depth):
    (case,) = (case for case in CASES if case.name == "transformer")
    return ReversibleSequential(*[ReversibleBlock(*case.make_block(), split_dim=case.split_dim) for _ in range(depth)])


@pytest.mark.parametrize("depth", [4, 16, 64])
def test_conv_stack_needs_nine_streams_at_any_depth(depth):
    """The pair, the two gradients, three saved tensors, the residual, its gradient, and some scalars and vectors."""
    memory = measure(conv_stack(depth), torch.randn(8, 64, 32, 32))
    assert memory.activation_bytes == 9 * CONV_STREAM + SAMPLE + 8 + depth * STATISTICS
    assert memory.held_bytes == 2 * CONV_STREAM + SAMPLE + 4 + depth * STATISTICS  # The final pair, and the loss.


@pytest.mark.slow
def test_memory_of_256_blocks_is_the_same():
    """Counted without computing, which gives the same bytes (see below)."""
    with FakeTensorMode():
        memory = measure(conv_stack(256), torch.randn(8, 64, 32, 32))
    assert memory.activation_bytes == 9 * CONV_STREAM + SAMPLE + 8 + 256 * STATISTICS
    assert memory.held_bytes == 2 * CONV_STREAM + SAMPLE + 4 + 256 * STATISTICS


@pytest.mark.parametrize("depth", [4, 16, 64])
def test_pair_needs_the_memory_of_a_tensor(depth):
    memory = measure(conv_stack(depth), (torch.randn(8, 32, 32, 32), torch.randn(8, 32, 32, 32)))
    assert memory.activation_bytes == 9 * CONV_STREAM + SAMPLE + 16 + depth * STATISTICS
    assert memory.held_bytes == 2 * CONV_STREAM + SAMPLE + 8 + depth * STATISTICS


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dense_gradient_of_the_output_needs_no_more_memory(requires_grad):
    """A network's head sends a dense gradient; it is split at once, so that neither half keeps the other alive."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = conv_stack(4)

        def forward(self, x, weights):
            return self.stack(x).mul(weights).sum()

    x, weights = torch.randn(2, 8, 64, 32, 32).unbind()
    memory = measure(Head(), x.requires_grad_(requires_grad), weights)
    assert memory.activation_bytes <= 9 * CONV_STREAM + SAMPLE + 1024 + 4 * STATISTICS


def test_transformer_stack_is_flat_in_depth():
    """The pair, its gradients, the perceptron's norm, its hidden layer twice, the gradient of that layer, and a
    weight's."""
    peaks = [measure(transformer_stack(depth), torch.randn(2, 256, 512)).activation_bytes for depth in (4, 8, 16)]
    with FakeTensorMode():
        peaks.append(measure(transformer_stack(256), torch.randn(2, 256, 512)).activation_bytes)
    assert len(set(peaks)) == 1
    assert peaks[0] <= 17 * TRANSFORMER_STREAM + 4 * 256 * 1024 + 2**13


def test_low_precision_copies_of_weights_are_not_kept():
    """Autocast casts a weight once for all functions that share it, and keeps the cast until it exits."""
    function = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Tanh())
    sequence = ReversibleSequential(*[ReversibleBlock(function, function, split_dim=-1) for _ in range(3)])
    x = torch.randn(4, 128, requires_grad=True)
    with LiveBytes([x, *sequence.parameters()]) as counter:
        with torch.autocast("cpu", torch.bfloat16):
            loss = sequence(x).sum()
        assert counter.live_bytes == 4 * 128 * 4 + 4  # The output and the loss.
        loss.backward()


def test_memory_of_the_stored_twin_grows_with_depth():
    """The counter sees what it should: eight saved tensors for each block."""
    peaks = [measure(conv_stack(depth, Store()), torch.randn(8, 64, 32, 32)).activation_bytes for depth in (4, 8)]
    assert peaks[1] - peaks[0] >= 4 * 8 * CONV_STREAM


def test_stored_last_block_adds_only_its_activations():
    depth = 8
    mixed = conv_stack(depth, [Reverse()] * (depth - 1) + [Store()])
    assert measure(mixed, torch.randn(8, 64, 32, 32)).activation_bytes <= (
        12 * CONV_STREAM + SAMPLE + 1024 + (depth - 1) * STATISTICS
    )


def test_single_function_holds_only_its_input():
    """It does not hold the stream that it updates, which nothing reads again; the input belongs to the caller."""
    function = ConvResidual(32)
    x1, x2 = torch.randn(8, 32, 32, 32), torch.randn(8, 32, 32, 32)
    with LiveBytes([x1, x2, *function.parameters(), *function.buffers()]) as counter:
        y1, y2 = reversible(Chain([HalfBlock(function, 0, 1)]).bind(), (x1, x2))
        loss = y1.sum()
        assert y2 is x2
        assert counter.live_bytes == CONV_STREAM + 4 + STATISTICS // 2  # y1, the loss and the statistics.
        del y1
        assert counter.live_bytes == 4 + STATISTICS // 2
        loss.backward()
    gradients = [parameter.grad.clone() for parameter in function.parameters()]
    function.zero_grad()
    stored(Chain([HalfBlock(function, 0, 1)]).bind(), (x1, x2))[0].sum().backward()
    for gradient, parameter in zip(gradients, function.parameters(), strict=True):
        assert torch.equal(gradient, parameter.grad)  # Nothing was rebuilt, so nothing was rounded.


def test_dropout_stores_random_states_instead_of_masks():
    def stack(depth):
        blocks = [ReversibleBlock(nn.Sequential(ConvResidual(8), nn.Dropout()), ConvResidual(8)) for _ in range(depth)]
        return measure(ReversibleSequential(*blocks), torch.randn(2, 16, 16, 16)).activation_bytes

    state_bytes = torch.get_rng_state().numel()
    assert stack(16) - stack(8) <= 8 * state_bytes


@pytest.mark.parametrize("mode", [FakeTensorMode(), torch.device("meta")], ids=["fake", "meta"])
def test_counts_memory_without_computing(mode):
    """Shapes alone give the same bytes."""
    expected = measure(conv_stack(4), torch.randn(8, 64, 32, 32))
    with mode:
        assert measure(conv_stack(4), torch.randn(8, 64, 32, 32)) == expected


def live_bytes_after(step, parameters):
    with LiveBytes(parameters) as counter:
        for _ in range(3):
            step()
        gc.collect()
        return counter.live_bytes


@pytest.mark.parametrize("use", ["backward", "forward only", "retained", "two graphs"])
def test_nothing_remains_allocated(use):
    sequence = conv_stack(3)
    for parameter in sequence.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(2, 64, 8, 8)

    def step():
        loss = sequence(x).sum()
        if use == "backward":
            loss.backward()
        elif use == "retained":
            loss.backward(retain_graph=True)
            loss.backward()
        elif use == "two graphs":
            other = sequence(x).sum()
            loss.backward()
            other.backward()

    keep = [x, *sequence.parameters(), *sequence.buffers(), *[p.grad for p in sequence.parameters()]]
    assert live_bytes_after(step, keep) == 0


def train(num_steps, use):
    """Run training steps of one kind; yield after each."""
    sequence = ReversibleSequential(
        *[ReversibleBlock(nn.Sequential(mlp(4), nn.Dropout(0.2)), nn.BatchNorm1d(4)) for _ in range(3)]
    )
    for parameter in sequence.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x = torch.randn(4, 8)
    keep = [x, *sequence.parameters(), *sequence.buffers(), *[p.grad for p in sequence.parameters()]]
    with LiveBytes(keep) as counter:
        graph = None
        for _ in range(num_steps):
            y = sequence(x)
            if use == "backward":
                y.sum().backward()
            elif use == "loss ignores the output":
                y.detach().sum()
            elif use == "partial gradient":
                torch.autograd.grad(y.sum(), sequence[1].f[0][0].weight)
            elif use == "double backward":
                (grad,) = torch.autograd.grad(y.square().sum(), sequence[0].f[0][0].weight, create_graph=True)
                grad.square().sum().backward()
                del grad
            elif use == "graph kept until the next step":
                graph = y.sum()
                graph.backward(retain_graph=True)
            elif use == "tensor of the graph looked at":
                # The node before the concatenation of both streams.
                last = y.grad_fn.next_functions[1][0].next_functions[0][0]
                norm = last.next_functions[1][0]
                assert norm._saved_input.shape == (4, 4)
                del norm, last
                y.sum().backward()
            del y
            yield counter.live_bytes
        del graph


USES = [
    "backward",
    "backward never called",
    "loss ignores the output",
    "partial gradient",
    "double backward",
    "graph kept until the next step",
    "tensor of the graph looked at",
]


def assert_flat(use, num_steps):
    """Check that neither bytes nor Python objects grow, without help of the garbage collector."""
    live_bytes, num_objects = [], []
    gc.collect()
    gc.disable()
    try:
        for step, live in enumerate(train(num_steps, use)):
            if step % (num_steps // 4) == 5:  # Five steps fill all caches.
                live_bytes.append(live)
                num_objects.append(len(gc.get_objects()))
    finally:
        gc.enable()
    assert len(set(live_bytes)) == 1
    assert live_bytes[0] == 0 or use == "graph kept until the next step"
    assert max(num_objects) - num_objects[0] <= 20  # The lists of this function.


@pytest.mark.parametrize("use", USES)
def test_memory_is_flat_over_a_hundred_steps(use):
    assert_flat(use, 100)


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_memory_is_flat_over_a_thousand_steps(use):
    assert_flat(use, 1000)


def test_retained_graph_holds_only_the_final_pair():
    sequence = conv_stack(4)
    for parameter in sequence.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x1, x2 = torch.randn(8, 32, 32, 32), torch.randn(8, 32, 32, 32)
    keep = [x1, x2, *sequence.parameters(), *sequence.buffers(), *[p.grad for p in sequence.parameters()]]
    with LiveBytes(keep) as counter:
        loss = sum(y.sum() for y in sequence((x1, x2)))
        loss.backward(retain_graph=True)
        assert counter.live_bytes <= 2 * CONV_STREAM + 1024 + 4 * STATISTICS


def test_graph_is_freed_without_the_garbage_collector():
    sequence = conv_stack(2)
    keep = [*sequence.parameters(), *sequence.buffers()]
    gc.collect()
    gc.disable()
    try:
        with LiveBytes(keep) as counter:
            sequence(torch.randn(2, 64, 8, 8))
            assert counter.live_bytes == 0
    finally:
        gc.enable()


def test_measuring_does_not_change_the_model():
    sequence = ReversibleSequential(ReversibleBlock(nn.Sequential(ConvResidual(4), nn.Dropout()), ConvResidual(4)))
    x = torch.randn(2, 8, 4, 4)
    sequence(x).sum().backward()
    gradients = [parameter.grad.clone() for parameter in sequence.parameters()]
    buffers = [buffer.clone() for buffer in sequence.buffers()]
    state = torch.get_rng_state()
    measure(sequence, x)
    assert torch.equal(torch.get_rng_state(), state)
    for parameter, expected in zip(sequence.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, expected)
    for buffer, expected in zip(sequence.buffers(), buffers, strict=True):
        assert torch.equal(buffer, expected)


def test_twin_has_the_same_parameters():
    sequence = conv_stack(2)
    assert list(stored_twin(sequence).state_dict()) == list(sequence.state_dict())


class Masked(nn.Linear):
    """Multiplies by a constant that is neither a parameter nor a buffer."""

    def __init__(self, width):
        super().__init__(width, width)
        self.mask = torch.tril(torch.ones(width, width))

    def forward(self, x):
        return self.mask @ super().forward(x)


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint()])
def test_predicts_functions_that_use_other_tensors(policy):
    blocks = [ReversibleBlock(Masked(8), Masked(8), split_dim=-1) for _ in range(3)]
    sequence, x = ReversibleSequential(*blocks, policy=policy), torch.randn(2, 8, 16)
    predicted, measured = predict(sequence, x), measure(sequence, x)
    assert (predicted.peak_bytes, predicted.held_bytes) == (measured.peak_bytes, measured.held_bytes)
