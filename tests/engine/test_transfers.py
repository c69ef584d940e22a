"""Copies that overlap with computation, on a simulated device.

The CPU stands for the GPU. Its computations run at once, and the copies of the simulated copy stream run as late as the
waits allow, or at once. A copy that is late finds a tensor that was freed or reused before it was copied, or that was
read before it arrived.
"""

import copy
import gc
import random
import weakref

import pytest
import torch
from torch import nn

from revnet import Offload, PolicySequential, ReversibleBlock, ReversibleSequential, Store, set_policy
from revnet.engine import _capture, _offload, _transfers
from revnet.engine._tensors import ALONE, use_count
from revnet.engine._transfers import Transfers, bytes_of, span_of
from tests.contracts.random_programs import draw_inputs, draw_sequence, run_program
from tests.contracts.test_gpu import to_device
from tests.helpers import CASE, DEPTH, all_cases, gradients, leaves, mlp, squares, stored_twin

GARBAGE = 0xFF
"""Byte that fills memory until a copy arrives; floats of such bytes are NaN."""


class FakeStream:
    """A copy stream that runs its copies late, or at once."""

    def __init__(self, is_late):
        self.is_late, self.is_home = is_late, True
        self.log, self.num_buffers, self.most_bytes = [], 0, 0
        self.queue, self.num_copies, self.num_done = [], 0, 0
        self.is_following = False
        self.hosts = set()

    def follow(self):
        self.is_following = True
        self.log.append("follow")

    def copy(self, target, source):
        assert self.is_following, "a copy does not wait for the computation before it"
        self.is_following = False
        assert target.dtype == source.dtype == torch.uint8
        assert target.shape == source.shape
        self.num_copies += 1
        is_fetch = source.data_ptr() in self.hosts
        self.log.append("fetch" if is_fetch else "store")
        if is_fetch:
            target.fill_(GARBAGE)
        self.queue.append((target, source, target if is_fetch else source))
        if not self.is_late:
            self.run(self.num_copies)
        pending = {on_device.untyped_storage()._cdata: on_device.numel() for *_, on_device in self.queue}
        self.most_bytes = max(self.most_bytes, sum(pending.values()))

    def run(self, number):
        while self.num_done < number:
            target, source, on_device = self.queue.pop(0)
            self.num_done += 1
            if self.is_late:  # the queue holds one reference
                assert use_count(on_device.untyped_storage()._cdata) > ALONE, "a tensor was freed before it was copied"
            target.copy_(source)

    def mark(self):
        return self.num_copies

    def wait_for(self, event):
        self.log.append("wait")
        self.run(event)

    def new_buffer(self, num_bytes):
        self.num_buffers += 1
        buffer = torch.full((num_bytes,), GARBAGE, dtype=torch.uint8)
        self.hosts.add(buffer.data_ptr())
        return buffer


@pytest.fixture(params=["late", "at once"])
def stream(request):
    return FakeStream(request.param == "late")


def stored_by(transfers, tensor):
    """Return a packed tensor whose copy has begun."""
    packed = transfers.store(tensor)
    packed.begin()
    return packed


@pytest.fixture
def transfers(stream, monkeypatch):
    """Make CPU tensors count as tensors on a GPU."""
    transfers = Transfers(stream, most_bytes=300)
    monkeypatch.setattr(_offload, "_is_on_host", lambda tensor: False)
    monkeypatch.setattr(_offload, "_is_on_gpu", lambda tensor: True)
    monkeypatch.setattr(_offload, "transfers_for", lambda device: transfers)
    return transfers


def outcome(module, inputs, seed=1):
    """Return the output, all gradients and the buffers after a step."""
    x, args, kwargs = inputs
    torch.manual_seed(seed)
    for leaf in leaves(inputs):
        leaf.grad = None
    module.zero_grad()
    y = module(x, *args, **kwargs)
    squares(y).backward()
    grads = [leaf.grad for leaf in leaves(inputs) if leaf.grad is not None]
    return [y.detach(), *[value.clone() for value in (*grads, *gradients(module).values(), *module.buffers())]]


@all_cases
def test_equals_the_twin_bit_for_bit(case, transfers, stream):
    sequence = case.sequence(DEPTH, Offload(overlap=True))
    twin = stored_twin(sequence)
    inputs = (case.input(), case.args(), case.kwargs())
    num_buffers = []
    for seed in range(2):
        actual, expected = outcome(sequence, inputs, seed), outcome(twin, inputs, seed)
        assert all(map(torch.equal, actual, expected))
        assert transfers.bytes_in_flight == 0
        num_buffers.append(stream.num_buffers)
    assert num_buffers[0] == num_buffers[1]  # the second step reuses the host buffers
    assert "fetch" in stream.log


class Unpack(torch.autograd.Function):
    """Calls a function with a number in the backward pass."""

    @staticmethod
    def forward(ctx, x, unpack, number):
        ctx.unpack, ctx.number = unpack, number
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.unpack(ctx.number)
        return grad, None, None


@pytest.mark.parametrize("interval", [1, 3])
def test_fetches_ahead_in_reverse_order(stream, interval):
    """Tensors that were fetched and then passed over are dropped."""
    transfers = Transfers(stream, most_bytes=1000)
    packed = [stored_by(transfers, torch.full((25,), float(number))) for number in range(40)]
    fetched_bytes = []

    def unpack(number):
        assert torch.equal(packed[number].unpack(), torch.full((25,), float(number)))
        fetched_bytes.append(100 * sum(each.fetched is not None for each in packed))
        assert transfers.bytes_in_flight <= 1000

    y = torch.zeros(1, requires_grad=True)
    for number in range(0, 40, interval):
        y = Unpack.apply(y, unpack, number)
    y.sum().backward()
    assert len(fetched_bytes) == len(range(0, 40, interval))
    assert max(fetched_bytes) <= 1000
    if interval == 1:
        assert max(fetched_bytes) > 800
        assert stream.log.count("fetch") == 30  # the last ten were still on the device
    assert transfers.bytes_in_flight == 0


def test_bound_on_what_is_in_flight(stream):
    transfers = Transfers(stream, most_bytes=1000)
    kept = []
    for number in range(100):
        kept.append(stored_by(transfers, torch.zeros(20 + number)))
        assert transfers.bytes_in_flight <= 1000
    kept.append(stored_by(transfers, torch.zeros(10_000)))  # larger than the bound
    assert transfers.bytes_in_flight == 40_000
    kept.append(stored_by(transfers, torch.zeros(1)))
    assert transfers.bytes_in_flight == 4
    many = [stored_by(transfers, torch.zeros(1)) for _ in range(200)]
    assert transfers.bytes_in_flight <= 4 * _transfers.MOST_COPIES
    del many


def test_reuses_host_buffers(stream):
    transfers = Transfers(stream)
    for _ in range(3):
        packed = [stored_by(transfers, torch.zeros(size)) for size in (200, 250, 300)]
        del packed
    assert stream.num_buffers == 3
    other = stored_by(transfers, torch.arange(256.0))  # another size of the same class
    assert stream.num_buffers == 3
    transfers.settle()
    assert torch.equal(other.unpack(), torch.arange(256.0))


def test_a_dropped_graph_frees_everything_after_the_next_wait(stream):
    transfers = Transfers(stream)
    tensor = torch.zeros(8)
    storage = weakref.ref(tensor.untyped_storage())
    packed = stored_by(transfers, tensor)
    del tensor, packed
    transfers.settle()
    gc.collect()
    assert storage() is None
    assert transfers.bytes_in_flight == 0


LAYOUTS = {
    "contiguous": lambda: torch.randn(3, 4),
    "transposed": lambda: torch.randn(3, 4).t(),
    "part": lambda: torch.randn(6, 8)[1:4, 2:6],
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "empty": lambda: torch.randn(0, 4),
    "number": lambda: torch.tensor(2.5),
    "bools": lambda: torch.rand(5) > 0.5,
    "complex": lambda: torch.randn(3, dtype=torch.complex128),
    "bfloat16": lambda: torch.randn(3).bfloat16(),
    "integers": lambda: torch.arange(7),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(stream, make):
    transfers = Transfers(stream)
    tensor = make()
    expected, strides = tensor.clone(), tensor.stride()
    packed = stored_by(transfers, tensor)
    del tensor
    transfers.settle()
    result = packed.unpack()
    transfers.settle()
    assert torch.equal(result, expected)
    assert (result.stride(), result.dtype) == (strides, expected.dtype)


def test_span_and_bytes():
    x = torch.arange(12.0).view(3, 4)
    assert span_of(x[:, 1]) == 4 * (2 * 4 + 1)
    assert bytes_of(x[1:, 2:])[:4].view(torch.float32).item() == 6.0
    assert span_of(x.expand(5, 3, 4)) == 48


def test_a_write_during_the_copy_raises(stream):
    transfers = Transfers(stream)
    tensor = torch.zeros(4)
    packed = stored_by(transfers, tensor)
    tensor.add_(1)
    with pytest.raises(RuntimeError, match=r"a tensor of shape \(4,\) was written to before it was copied to the host"):
        packed.unpack()
    transfers.settle()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        packed.unpack()


def test_a_write_after_the_copy_is_harmless(stream):
    transfers = Transfers(stream)
    tensor = torch.zeros(4)
    packed = stored_by(transfers, tensor)
    transfers.settle()
    tensor.add_(1)
    assert torch.equal(packed.unpack(), torch.zeros(4))


def test_freed_memory_raises(stream):
    """FSDP frees memory by resizing storages, which a reference does not prevent."""
    transfers = Transfers(stream)
    tensor = torch.zeros(4)
    if stream.is_late:
        stream.queue = []
    packed = stored_by(transfers, tensor)
    stream.queue, stream.num_done = [], stream.num_copies
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="was written to before"):
        packed.unpack()


def test_parameters_are_copied_before_they_can_be_freed(stream):
    transfers = Transfers(stream)
    weight = nn.Parameter(torch.ones(4, 4))
    packed = [stored_by(transfers, weight), stored_by(transfers, weight.t())]
    assert transfers.bytes_in_flight == 0
    weight.untyped_storage().resize_(0)
    assert all(torch.equal(each.unpack(), torch.ones(4, 4)) for each in packed)


def test_another_stream_fetches_nothing_ahead(stream):
    transfers = Transfers(stream, most_bytes=1000)
    packed = [stored_by(transfers, torch.full((25,), float(number))) for number in range(20)]
    stream.is_home = False
    for number in reversed(range(20)):
        assert torch.equal(packed[number].unpack(), torch.full((25,), float(number)))
        assert transfers.bytes_in_flight == 0


def test_nothing_is_fetched_ahead_outside_of_a_backward_pass(stream):
    transfers = Transfers(stream, most_bytes=1000)
    packed = [stored_by(transfers, torch.zeros(25)) for _ in range(20)]
    packed[19].unpack()
    transfers.settle()
    before = stream.log.count("fetch")
    packed[5].unpack()
    assert stream.log.count("fetch") == before + 1


def test_retained_graph_and_double_backward(transfers):
    blocks = [ReversibleBlock(mlp(4), mlp(4)) for _ in range(3)]
    sequence = ReversibleSequential(*blocks, policy=Offload(overlap=True)).double()
    twin = stored_twin(sequence)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (sequence, twin):
        y = squares(module(x))
        (first,) = torch.autograd.grad(y, x, retain_graph=True)
        (again,) = torch.autograd.grad(y, x, create_graph=True)
        results.append(
            [first, again, *torch.autograd.grad(squares(again), [x, *module.parameters()], allow_unused=True)]
        )
    for actual, expected in zip(*results, strict=True):
        assert actual is expected is None or torch.equal(actual, expected)


def test_gradients_of_some_inputs(transfers):
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(4), mlp(4)) for _ in range(4)], policy=Offload(overlap=True))
    twin = stored_twin(sequence)
    x = torch.randn(3, 8)
    results = [
        torch.autograd.grad(squares(module(x)), list(module.blocks[2].parameters())) for module in (sequence, twin)
    ]
    assert all(map(torch.equal, *results))
    assert transfers.bytes_in_flight == 0


@pytest.mark.parametrize("seed", range(15))
def test_random_programs(transfers, stream, seed):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    sequence = draw_sequence(draw)
    twin, inputs = stored_twin(sequence), draw_inputs(draw)
    set_policy(sequence, Offload(overlap=True))
    observed = run_program(sequence, copy.deepcopy(inputs), seed)
    expected = run_program(twin, copy.deepcopy(inputs), seed)
    for value, expected_value in zip(observed, expected, strict=True):
        assert value is expected_value is None or torch.equal(value, expected_value)
    assert "fetch" in stream.log


def test_an_error_in_the_backward_pass_does_no_harm(transfers):
    sequence = ReversibleSequential(*[ReversibleBlock(mlp(4), mlp(4)) for _ in range(4)], policy=Offload(overlap=True))
    twin = stored_twin(sequence)
    x = torch.randn(3, 8)

    def fail(grad):
        raise ArithmeticError

    handle = sequence.blocks[1].f[0].weight.register_hook(fail)
    with pytest.raises(ArithmeticError):
        squares(sequence(x)).backward()
    handle.remove()
    for module in (sequence, twin):
        module.zero_grad()
        squares(module(x)).backward()
    assert all(map(torch.equal, gradients(sequence).values(), gradients(twin).values()))


def test_two_graphs_at_once(transfers):
    modules = [PolicySequential(mlp(6), mlp(6), policy=Offload(overlap=True)) for _ in range(2)]
    twins = [PolicySequential(*copy.deepcopy(module), policy=Store()) for module in modules]
    x = torch.randn(5, 6)
    for pair in (modules, twins):
        losses = [squares(module(x)) for module in pair]
        for loss in losses:
            loss.backward()
    for module, twin in zip(modules, twins, strict=True):
        assert all(map(torch.equal, gradients(module).values(), gradients(twin).values()))


def test_without_the_option_nothing_overlaps(stream, monkeypatch):
    monkeypatch.setattr(_offload, "_is_on_host", lambda tensor: False)
    monkeypatch.setattr(_offload, "_is_on_gpu", lambda tensor: pytest.fail("asked"))
    sequence = CASE["mlp"].sequence(2, Offload())
    squares(sequence(CASE["mlp"].input())).backward()
    assert str(Offload()) == "Offload()"
    assert str(Offload(overlap=True)) == "Offload(overlap=True)"
    assert Offload() != Offload(overlap=True)


@pytest.mark.parametrize("policy", [Offload(), Offload(overlap=True)], ids=str)
def test_cannot_be_captured(policy, monkeypatch):
    monkeypatch.setattr(_offload, "HAS_ACCELERATOR", True)
    monkeypatch.setattr(_capture, "_is_initialized", lambda: True)
    monkeypatch.setattr(_capture, "_is_stream_capturing", lambda: True)
    sequence = CASE["mlp"].sequence(2, policy)
    with pytest.raises(NotImplementedError, match="cannot be kept on the host while a CUDA graph is captured"):
        sequence(CASE["mlp"].input())


@pytest.mark.gpu
@all_cases
def test_on_a_gpu_equals_the_twin_bit_for_bit(case):
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        sequence = case.sequence(DEPTH, Offload(overlap=True)).to("cuda")
        twin = stored_twin(sequence)
        inputs = to_device((case.input(), case.args(), case.kwargs()))
        for seed in range(3):
            assert all(map(torch.equal, outcome(sequence, inputs, seed), outcome(twin, inputs, seed)))


@pytest.mark.gpu
def test_on_a_gpu_large_tensors_arrive_before_they_are_used():
    def make(policy):
        torch.manual_seed(0)
        functions = [nn.Sequential(nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 1024)) for _ in range(16)]
        return PolicySequential(*functions, policy=policy).to("cuda")

    x = torch.randn(8192, 1024, device="cuda", requires_grad=True)
    modules = [make(Offload(overlap=True)), make(Store())]
    peaks = []
    for module in modules:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            module.zero_grad()
            squares(module(x)).backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert all(map(torch.equal, gradients(modules[0]).values(), gradients(modules[1]).values()))
    # Sixteen times three tensors of 32 MiB are stored.
    assert peaks[0] < peaks[1] - 2**30


class Power(nn.Module):
    """Saves a tensor, and the same memory with a lazy conjugate."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, dtype=torch.complex128)

    def forward(self, x):
        z = self.linear(x)
        return 0.1 * z * z.conj() + z * z.conj().imag


def test_lazy_conjugates_are_other_tensors(monkeypatch):
    monkeypatch.setattr(_offload, "_is_on_host", lambda tensor: False)
    sequence = ReversibleSequential(ReversibleBlock(Power(), Power(), split_dim=-1), policy=Offload())
    twin = stored_twin(sequence)
    x = torch.randn(3, 8, dtype=torch.complex128)
    for module in (sequence, twin):
        torch.view_as_real(module(x)).square().sum().backward()
    for name, expected in gradients(twin).items():
        assert torch.equal(gradients(sequence)[name], expected)
