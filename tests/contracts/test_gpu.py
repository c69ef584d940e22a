"""Tests on a GPU: random state, kernels, autocast, and peak memory of the allocator."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from revnet import Reverse, ReversibleBlock, ReversibleSequential, Store
from tests.helpers import (
    CASE,
    DEPTH,
    ConvResidual,
    all_cases,
    all_policies,
    assert_close,
    assert_outside_randomness_raises,
    assert_same_buffers,
    assert_silent_write_raises,
    gradients,
    leaves,
    mlp,
    squares,
    stored_twin,
)

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),  # from the copy
]


def to_device(values):
    """Return a copy on the device whose tensors are leaves."""
    return tree_map_only(
        torch.Tensor, lambda t: t.detach().to(DEVICE, copy=True).requires_grad_(t.requires_grad), values
    )


def random_states():
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if DEVICE == "cuda" else [])]


@all_policies
@all_cases
def test_step_equals_the_twin(case, policy):
    """The comparison includes dropout masks, statistics, and both random states at the end."""
    sequence = case.sequence(DEPTH, policy).to(DEVICE)
    twin = stored_twin(sequence)
    inputs = (case.input(), case.args(), case.kwargs())
    outcomes = []
    for module in (sequence, twin):
        x, args, kwargs = moved = to_device(inputs)
        torch.manual_seed(1)
        y = module(x, *args, **kwargs)
        squares(y).backward()
        outcomes.append((y.detach(), [leaf.grad for leaf in leaves(moved)], gradients(module), random_states()))
    assert_close(*(outcome[:3] for outcome in outcomes), tolerance=1e-8)  # kernels may add in a different order
    for state, expected in zip(outcomes[0][3], outcomes[1][3], strict=True):
        assert torch.equal(state, expected)
    for buffer, expected in zip(sequence.buffers(), twin.buffers(), strict=True):
        assert_close(buffer, expected)


def test_backward_does_not_advance_the_random_state():
    case = CASE["conv-dropout"]
    sequence = case.sequence(3).to(DEVICE)
    loss = squares(sequence(to_device(case.input())))
    before = random_states()
    loss.backward()
    for state, expected in zip(random_states(), before, strict=True):
        assert torch.equal(state, expected)


class Elsewhere(nn.Module):
    """Computes with dropout on a device other than the stream's."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(mlp(3), nn.Dropout(0.5)).double().to(DEVICE)

    def forward(self, x):
        return self.inner(x.to(DEVICE)).to(x.device)


def test_function_on_another_device_than_the_stream():
    sequence = ReversibleSequential(*[ReversibleBlock(Elsewhere(), nn.Dropout(0.5)) for _ in range(3)])
    twin = stored_twin(sequence)
    x = torch.randn(4, 6, dtype=torch.float64)
    for module in (sequence, twin):
        torch.manual_seed(1)
        squares(module(x)).backward()
    assert_close(gradients(sequence), gradients(twin))


def test_a_stream_on_each_device():
    """`f` moves the second stream to the first one's device, and `g` moves it back."""

    class Over(nn.Module):
        def __init__(self, here, there):
            super().__init__()
            self.inner, self.there = nn.Sequential(mlp(3), nn.Dropout(0.5)).double().to(here), there

        def forward(self, x):
            return self.inner(x).to(self.there)

    blocks = [ReversibleBlock(Over(DEVICE, "cpu"), Over("cpu", DEVICE)) for _ in range(3)]
    sequence = ReversibleSequential(*blocks)
    twin = stored_twin(sequence)
    x1 = torch.randn(4, 3, dtype=torch.float64)
    x2 = torch.randn(4, 3, dtype=torch.float64, device=DEVICE)
    for module in (sequence, twin):
        torch.manual_seed(1)
        y1, y2 = module((x1, x2))
        (squares(y1) + squares(y2).cpu()).backward()
    assert_close(gradients(sequence), gradients(twin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("name", ["conv", "conv-dropout", "attention", "attention-context-mask", "mlp"])
def test_autocast(name, backward_inside, dtype):
    case = CASE[name]
    sequence = case.sequence(3).float().to(DEVICE)
    twin = stored_twin(sequence)
    x, args = (
        tree_map_only(torch.Tensor, torch.Tensor.float, value) for value in to_device((case.input(), case.args()))
    )
    kwargs = to_device(case.kwargs())
    for module in (sequence, twin):
        torch.manual_seed(1)
        with torch.autocast(DEVICE, dtype):
            loss = module(x.detach(), *args, **kwargs).square().mean()
            assert loss.dtype is torch.float32
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
    # A rebuilt float32 stream may rarely round to another bfloat16, which changes one of many terms by 2^-8.
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert (parameter.grad - expected.grad).norm() <= 1e-2 * expected.grad.norm() + 1e-6


def test_scaled_gradients():
    """float16 with a gradient scaler, compared with the same steps of the twin."""
    sequence = CASE["mlp"].sequence(3).float().to(DEVICE)
    twin = stored_twin(sequence)
    x = to_device(CASE["mlp"].input(requires_grad=False)).float()
    for module in (sequence, twin):
        scaler = torch.amp.GradScaler(DEVICE)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, torch.float16):
                loss = module(x).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    for parameter, expected in zip(sequence.parameters(), twin.parameters(), strict=True):
        assert_close(parameter, expected, tolerance=1e-3)


def test_channels_last_stays_channels_last():
    sequence = CASE["conv"].sequence(3).to(DEVICE, memory_format=torch.channels_last)
    twin = stored_twin(sequence)
    x = to_device(CASE["conv"].input(requires_grad=False)).to(memory_format=torch.channels_last)
    for module in (sequence, twin):
        y = module(x)
        assert y.is_contiguous(memory_format=torch.channels_last)
        squares(y).backward()
    assert_close(gradients(sequence), gradients(twin), tolerance=1e-8)
    assert_same_buffers(sequence, twin)


def test_on_another_cuda_stream():
    """Forward and backward run in the order of one CUDA stream that is not the default one."""
    case = CASE["conv-dropout"]
    sequence = case.sequence(DEPTH).to(DEVICE)
    twin = stored_twin(sequence)
    x = to_device(case.input(requires_grad=False))
    for module in (sequence, twin):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        torch.manual_seed(1)
        with torch.cuda.stream(stream):
            squares(module(x)).backward()
        torch.cuda.current_stream().wait_stream(stream)
    assert_close(gradients(sequence), gradients(twin), tolerance=1e-8)


@pytest.mark.parametrize("place", range(4))
def test_outside_randomness_raises_in_the_first_run(place):
    assert_outside_randomness_raises(place, DEVICE)


def test_silent_write_to_the_output_raises_in_the_first_run():
    assert_silent_write_raises(DEVICE)


@pytest.mark.parametrize("autocast", [False, True])
def test_no_false_alarm(autocast):
    """`cudnn.benchmark` may choose another algorithm for the replay."""
    blocks = [ReversibleBlock(ConvResidual(16), ConvResidual(16)) for _ in range(32)]
    sequence = ReversibleSequential(*blocks).to(DEVICE)
    with torch.backends.cudnn.flags(enabled=True, benchmark=True), torch.autocast(DEVICE, torch.bfloat16, autocast):
        for _ in range(3):
            y = sequence(torch.randn(4, 32, 16, 16, device=DEVICE))
            y.square().mean().backward()


def peak_bytes(depth, policy, *, dropout=0.0):
    """Return the peak of a training step, without the model, its gradients and its input."""
    blocks = [
        ReversibleBlock(nn.Sequential(ConvResidual(32), nn.Dropout(dropout)), ConvResidual(32)) for _ in range(depth)
    ]
    sequence = ReversibleSequential(*blocks, policy=policy).to(DEVICE)
    x = torch.randn(8, 64, 32, 32, device=DEVICE)
    for _ in range(2):  # the first step allocates gradients and workspaces
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        squares(sequence(x)).backward()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_peak_memory_is_flat_in_depth(dropout):
    stream_bytes = 8 * 32 * 32 * 32 * 4
    shallow, deep = (peak_bytes(depth, Reverse(), dropout=dropout) for depth in (4, 32))
    assert deep - shallow < stream_bytes  # scalars and vectors of each function, in blocks of 512 bytes
    assert peak_bytes(32, Store(), dropout=dropout) > 2 * deep


def test_a_copy_made_on_the_cpu_trains_on_the_gpu():
    case = CASE["conv"]
    sequence = case.sequence(2)
    x = case.input(requires_grad=False)
    squares(sequence(x)).backward()
    other = copy.deepcopy(sequence).to(DEVICE)
    other.zero_grad()
    sequence.zero_grad()
    squares(sequence(x)).backward()
    squares(other(x.to(DEVICE))).backward()
    assert_close({n: g.cpu() for n, g in gradients(other).items()}, gradients(sequence), tolerance=1e-8)
