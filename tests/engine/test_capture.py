"""Runs that are captured in a CUDA graph, as far as a CPU can test them.

The CPU stands for the GPU: its tensors must not be read, and a generator that counts as PyTorch's CUDA generators do
stands for theirs.
"""

import copy
import ctypes
import math
import random
from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch import nn

from revnet import (
    Checkpoint,
    FixedPoint,
    PolicySequential,
    ReconstructionError,
    Reverse,
    ReversibleBlock,
    ReversibleSequential,
    Store,
)
from revnet.engine import (
    DriftMeter,
    _arrays,
    _capture,
    _careful,
    _digest,
    _observers,
    _range,
    _rebuild,
    _restore,
    _states,
    _surroundings,
)
from revnet.engine._random import get_random_state, set_random_state
from tests.contracts.random_programs import Averaged, draw_inputs, draw_sequence, run_program
from tests.helpers import (
    DEPTH,
    all_cases,
    all_reversible_models,
    assert_close,
    assert_same_buffers,
    gradients,
    mlp,
    model_input,
    squares,
    stored_twin,
)

GPU = torch.device("cuda", 0)
HOST_READS = ("__bool__", "__float__", "__int__", "__index__", "__array__", "cpu", "item", "numpy", "tolist")
READERS = ("array_of", "reader_of", "string_at")
POLICIES = [Reverse(), Reverse(hold=True), Reverse(keep="linear"), Checkpoint()]

all_rebuilding = pytest.mark.parametrize("policy", POLICIES, ids=str)


def state_of(seed, offset):
    """Return the bytes of a CUDA generator's state."""
    return torch.tensor([seed, offset]).view(torch.uint8)


class FakeGenerator:
    """A generator whose state is a seed and an offset. While a graph is captured, the offset counts from its start."""

    def __init__(self):
        self.seed, self.offset, self.in_graph = 1, 400, None

    def get_state(self, device):
        if device != GPU:
            return get_random_state(device)
        offset = self.offset if self.in_graph is None else self.in_graph
        return torch.frombuffer(
            bytearray(ctypes.string_at((ctypes.c_int64 * 2)(self.seed, offset), 16)), dtype=torch.uint8
        )

    def set_state(self, device, state):
        if device != GPU:
            set_random_state(device, state)
            return
        seed, offset = (ctypes.c_int64 * 2).from_address(state.data_ptr())
        if self.in_graph is None:
            self.seed, self.offset = seed, offset
        else:
            assert seed == self.seed  # PyTorch raises, too
            self.in_graph = offset

    def __deepcopy__(self, memo):
        return self

    def draw(self, shape):
        """Return numbers that depend on the position in the graph, or outside of it, on the offset."""
        offset = self.offset if self.in_graph is None else self.in_graph
        if self.in_graph is None:
            self.offset += 4
        else:
            self.in_graph += 4
        return torch.rand(shape, generator=torch.Generator().manual_seed(1000 * self.seed + offset))


class Graph:
    """Marks steps as captured, one graph after another."""

    def __init__(self, generator):
        self.generator, self.is_capturing = generator, False

    @contextmanager
    def capture(self):
        """Capture a graph: nothing may read a tensor, and the generator counts from 0."""
        self.is_capturing, self.generator.in_graph = True, 0
        try:
            with no_host_reads():
                yield
        finally:
            self.is_capturing, self.generator.in_graph = False, None


@contextmanager
def no_host_reads():
    """Raise if anything reads the values of a tensor."""

    def fail(*args, **kwargs):
        raise AssertionError("a value was read from the device")

    with pytest.MonkeyPatch.context() as patch:
        for name in HOST_READS:
            patch.setattr(torch.Tensor, name, fail)
        for module, name in (
            (_digest, "reader_of"),
            (_digest, "array_of"),
            (_states, "array_of"),
            (_arrays, "layout_of"),
        ):
            patch.setattr(module, name, fail)
        patch.setattr(_digest, "string_at", fail)
        yield


@pytest.fixture
def generator(monkeypatch):
    fake = FakeGenerator()
    for module in (_surroundings, _restore):
        monkeypatch.setattr(module, "get_random_state", fake.get_state)
    monkeypatch.setattr(_restore, "set_random_state", fake.set_state)
    return fake


@pytest.fixture
def graph(monkeypatch, generator):
    """Make CPU tensors count as tensors on a GPU."""
    graph = Graph(generator)
    for module in (_observers, _range, _restore, _surroundings):
        monkeypatch.setattr(module, "HAS_ACCELERATOR", True)
    monkeypatch.setattr(_capture, "_is_initialized", lambda: True)
    monkeypatch.setattr(_capture, "_is_stream_capturing", lambda: graph.is_capturing)
    for module in (_rebuild, _observers, _digest):
        monkeypatch.setattr(module, "can_digest", lambda x: False)
    monkeypatch.setattr(_states, "is_on_host", lambda x: False)
    monkeypatch.setattr(_states, "is_on_accelerator", lambda x: True)
    monkeypatch.setattr(_observers, "_is_on_host", lambda x: False)
    monkeypatch.setattr(_states, "checksum", lambda x: None if not graph.is_capturing else pytest.fail("read"))
    monkeypatch.setattr(_rebuild, "forward_mode_level", lambda: 0)  # no shortcut for tensors on the CPU
    add_devices = _surroundings.Surroundings.add_devices
    monkeypatch.setattr(_surroundings.Surroundings, "add_devices", lambda self, _: add_devices(self, {GPU}))
    monkeypatch.setattr(_surroundings, "has_autocast", lambda kind: kind == "cpu")
    return graph


class FakeDropout(nn.Module):
    """Dropout that draws from the fake generator."""

    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, x):
        return x * (self.generator.draw(x.shape) < 0.5).to(x)


class Counting(nn.Module):
    """Keeps a state in a buffer, and uses it."""

    def __init__(self):
        super().__init__()
        self.inner = mlp(4)
        self.register_buffer("count", torch.ones(1))

    def forward(self, x):
        self.count += 1
        return self.inner(x) * self.count


class Conv(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())


def with_dropout(generator):
    return nn.Sequential(mlp(4), FakeDropout(generator))


def sequence_of(make, policy, depth=3, **kwargs):
    return ReversibleSequential(*[ReversibleBlock(make(), make(), **kwargs) for _ in range(depth)], policy=policy)


def step(module, x):
    squares(module(x)).backward()


def warmed_up(sequence):
    """Run an eager step, and return the sequence."""
    x = torch.randn(5, 8).to(next(sequence.parameters()))
    step(sequence, x)
    sequence.zero_grad()
    return sequence


@all_rebuilding
@pytest.mark.parametrize("kind", ["plain", "dropout", "norm", "states", "exact"])
def test_reads_nothing_and_equals_the_twin(graph, generator, policy, kind):
    makers = {"dropout": lambda: with_dropout(generator), "norm": Conv, "states": Counting}
    options = {"coupling": FixedPoint()} if kind == "exact" else {}
    sequence = sequence_of(makers.get(kind, lambda: mlp(4)), policy, **options)
    if kind != "exact":
        sequence.double()
    twin = stored_twin(sequence)
    shape = (5, 8, 3, 3) if kind == "norm" else (5, 8)
    states = []
    for module in (sequence, twin):
        generator.offset = 400
        for number in range(3):  # two eager steps to warm up
            x = torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(next(module.parameters()))
            module.zero_grad()
            if number < 2:
                step(module, x)
                continue
            with graph.capture():
                step(module, x)
                states.append(generator.in_graph)
    assert states[0] == states[1] == (4 * 6 if kind == "dropout" else 0)
    assert_same_buffers(sequence, twin)
    assert_close(gradients(sequence), gradients(twin), tolerance=1e-5 if kind == "exact" else 1e-10)


@all_rebuilding
@all_cases
def test_no_kind_of_block_reads_the_device(graph, policy, case):
    sequence = case.sequence(DEPTH, policy)
    twin = stored_twin(sequence)
    inputs = (case.input(), case.args(), case.kwargs())
    for module in (sequence, twin):
        for seed in range(2):
            torch.manual_seed(seed)
            module.zero_grad()
            with graph.capture() if seed else nullcontext():
                x, args, kwargs = inputs
                squares(module(x, *args, **kwargs)).backward()
    assert_close(gradients(sequence), gradients(twin), tolerance=1e-8)
    assert_same_buffers(sequence, twin)


@all_reversible_models
def test_no_model_reads_the_device(graph, make_model):
    model = make_model().double()
    x, grads = model_input(model), []
    for captures in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        with graph.capture() if captures else nullcontext():
            squares(model(x)).backward()
        grads.append({name: grad.clone() for name, grad in gradients(model).items()})
    assert_close(*grads, tolerance=1e-8)


def test_eager_steps_are_watched_and_captured_ones_are_not(graph):
    sequence = sequence_of(lambda: mlp(4), Reverse())
    kinds = []

    def note(run, *args):
        kinds.append([type(observer).__name__ for observer in run.observers])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rebuild.Rebuilder, "hold", note)
        sequence(torch.randn(2, 8, requires_grad=True))
        with graph.capture():
            sequence(torch.randn(2, 8, requires_grad=True))
        with DriftMeter().on(), graph.capture():
            sequence(torch.randn(2, 8, requires_grad=True))
    assert kinds == [["DriftWatch"], [], []]


def test_a_drift_meter_has_no_records_of_a_captured_step(graph):
    sequence, meter = warmed_up(sequence_of(lambda: mlp(4), Reverse())), DriftMeter()
    with meter.on(), graph.capture():
        step(sequence, torch.randn(2, 8))
    assert meter.records == []


@all_rebuilding
def test_range_is_asserted_on_the_device(graph, policy, monkeypatch):
    assertions = []
    monkeypatch.setattr(_range, "assert_async", lambda condition, message: assertions.append((condition, message)))
    sequence = warmed_up(sequence_of(lambda: mlp(4), policy, depth=2, coupling=FixedPoint()).float())
    with graph.capture():
        step(sequence, torch.randn(2, 8))
    assert [bool(condition) for condition, _ in assertions] == [True] * 4
    assert assertions[0][1].startswith("a stream reached ")
    del assertions[:]
    with graph.capture():
        sequence(torch.full((2, 8), 1e30))
    assert not all(bool(condition) for condition, _ in assertions)
    del assertions[:]
    with graph.capture():
        sequence(torch.full((2, 8), math.nan))
    assert all(bool(condition) for condition, _ in assertions)


def test_inverse_asserts_the_range_on_the_device(graph):
    sequence = sequence_of(lambda: mlp(4), Reverse(), coupling=FixedPoint()).float()
    x = torch.randn(2, 8)
    with torch.no_grad():
        y = sequence(x)
        with graph.capture():
            again = sequence.inverse(y)
    assert torch.equal(again, sequence.inverse(y))


class Constant(nn.Module):
    """Multiplies by a tensor that is not a buffer, and computes that tensor again in each call."""

    def __init__(self):
        super().__init__()
        self.inner, self.table, self.changes, self.old = mlp(4), torch.rand(5, 4), False, []

    def forward(self, x):
        y = self.inner(x) * self.table
        self.old.append(self.table)
        self.table = self.table + float(self.changes)
        return y


@pytest.mark.parametrize("changes", [False, True])
def test_constants_are_compared_on_the_device(graph, changes, monkeypatch):
    assertions = []
    monkeypatch.setattr(_careful, "assert_async", lambda condition, message: assertions.append((condition, message)))
    sequence = warmed_up(sequence_of(Constant, Reverse(), depth=2))
    for block in sequence.blocks:
        block.f.changes = block.g.changes = changes
    with graph.capture():
        step(sequence, torch.randn(5, 8))
    assert assertions
    assert all(bool(condition) is not changes for condition, _ in assertions)
    assert "used a different tensor" in assertions[0][1]


def test_a_tolerance_cannot_be_captured(graph):
    blocks = [ReversibleBlock(mlp(4), mlp(4)) for _ in range(2)]
    sequence = ReversibleSequential(*blocks, tolerance=1e-3)
    with graph.capture(), pytest.raises(NotImplementedError, match="`tolerance` cannot be captured in a CUDA graph"):
        sequence(torch.randn(2, 8))


@all_rebuilding
def test_dropout_in_another_graph_raises(graph, generator, policy):
    """`make_graphed_callables` captures the backward pass in a graph of its own."""
    sequence = warmed_up(sequence_of(lambda: with_dropout(generator), policy))
    with graph.capture():
        loss = squares(sequence(torch.randn(2, 8)))
    with graph.capture(), pytest.raises(ReconstructionError, match="in another CUDA graph than the one that captures"):
        loss.backward()


@all_rebuilding
@pytest.mark.parametrize("make", [lambda: mlp(4), Counting])
def test_other_functions_may_be_rebuilt_in_another_graph(graph, generator, policy, make):
    sequence = sequence_of(make, policy).double()
    twin = stored_twin(sequence)
    x = torch.randn(2, 8, dtype=torch.float64)
    for module in map(warmed_up, (sequence, twin)):
        with graph.capture():
            generator.draw(1)  # outside of the functions
            loss = squares(module(x))
        with graph.capture():
            loss.backward()
    assert_close(gradients(sequence), gradients(twin), tolerance=1e-10)


@all_rebuilding
@pytest.mark.parametrize("is_forward_captured", [True, False])
def test_one_captured_pass_raises(graph, generator, policy, is_forward_captured):
    sequence = warmed_up(sequence_of(lambda: mlp(4), policy))
    x = torch.randn(2, 8)
    match = "the {} pass of a reversible sequence is captured in a CUDA graph, but its {} pass is not"
    if is_forward_captured:
        with graph.capture():
            loss = squares(sequence(x))
        with pytest.raises(ReconstructionError, match=match.format("forward", "backward")):
            loss.backward()
    else:
        loss = squares(sequence(x))
        with graph.capture(), pytest.raises(ReconstructionError, match=match.format("backward", "forward")):
            loss.backward()


@all_rebuilding
def test_old_releases_raise(graph, policy, monkeypatch):
    sequence = warmed_up(sequence_of(lambda: mlp(4), policy))
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with graph.capture(), pytest.raises(NotImplementedError, match=r"with PyTorch 2\.9\.1.*use PyTorch 2\.10 or later"):
        sequence(torch.randn(2, 8))
    sequence(torch.randn(2, 8))
    monkeypatch.setattr(torch, "__version__", "2.10.0a0+git1")
    with graph.capture():
        sequence(torch.randn(2, 8))


@pytest.mark.parametrize("num_warmups", [1, 63, 64])
def test_checksums_of_parameters_are_left_out(graph, num_warmups):
    """Every 64th call of a function reads its parameters."""
    sequence = sequence_of(lambda: mlp(4), Reverse(), depth=1)
    x = torch.randn(2, 8)
    for _ in range(num_warmups):
        sequence(x)
    with graph.capture():
        step(sequence, x)


def test_a_policy_of_a_module_reads_nothing(graph):
    module = PolicySequential(mlp(8), policy=Checkpoint())
    twin = PolicySequential(module[0], policy=Store())
    x = torch.randn(2, 8)
    with graph.capture():
        step(module, x)
    grads = gradients(module)
    module.zero_grad()
    step(twin, x)
    assert all(torch.equal(grads[f"{name}"], grad) for name, grad in gradients(twin).items())


def test_offset_follows_the_seed():
    assert _capture.offset_of(state_of(7, 1236)) == 1236


def test_nothing_is_captured_on_a_cpu():
    assert not _capture.is_capturing()
    assert not _capture.begins_in_capture()
    _capture.check_same_mode(False)


def test_a_machine_without_a_driver_is_not_asked(monkeypatch):
    """PyTorch for CUDA raises there if it is asked about the current stream."""
    for module in (_observers, _range, _restore, _surroundings):
        monkeypatch.setattr(module, "HAS_ACCELERATOR", True)

    def fail():
        raise RuntimeError("Found no NVIDIA driver on your system.")

    monkeypatch.setattr(_capture, "_is_stream_capturing", fail)
    function = nn.Sequential(mlp(4), nn.Dropout(0.5))
    blocks = [ReversibleBlock(function, function, coupling=FixedPoint()) for _ in range(2)]
    sequence = ReversibleSequential(*blocks, policy=Reverse())
    step(sequence, torch.randn(2, 8))
    sequence.inverse(torch.randn(2, 8))


@all_rebuilding
def test_a_first_call_cannot_be_captured(graph, policy):
    """Values are compared in eager steps: a write through `.data`, for instance, raises no version."""
    sequence = sequence_of(lambda: mlp(4), policy, depth=2)
    x = torch.randn(2, 8)
    match = "`blocks.0.f` is called for the first time while a CUDA graph is captured"
    with graph.capture(), pytest.raises(ReconstructionError, match=match):
        sequence(x)
    with torch.no_grad():
        sequence(x)  # compares nothing
    with graph.capture(), pytest.raises(ReconstructionError, match=match):
        sequence(x)
    step(sequence.eval(), x)
    with graph.capture(), pytest.raises(ReconstructionError, match=match):
        sequence.train()(x)
    step(sequence, x)
    with graph.capture():
        step(sequence, x)


@pytest.mark.parametrize("seeds", [range(0, 40)], ids=["forty"])
def test_random_programs(graph, seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        draw = random.Random(seed)
        sequence = draw_sequence(draw)
        if any(isinstance(module, Averaged) for module in sequence.modules()):
            continue  # An eager step compares its values, and raises on a GPU.
        twin, inputs = stored_twin(sequence), draw_inputs(draw)
        for module in (sequence, twin):
            run_program(module, copy.deepcopy(inputs), seed)
        with graph.capture():
            observed = run_program(sequence, inputs, seed)
        expected = run_program(twin, copy.deepcopy(inputs), seed)
        for value, expected_value in zip(observed, expected, strict=True):
            assert_close(value, expected_value, tolerance=1e-7)
