"""What a checkpointed function keeps, recomputes, and leaves unchanged."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from revnet import (
    Checkpoint,
    Offload,
    PolicySequential,
    ReconstructionError,
    ReversibleBlock,
    ReversibleSequential,
    Store,
    set_policy,
)
from revnet.engine import _states
from revnet.engine._checkpoint import checkpointed_call
from revnet.engine._offload import _OnHost, offloaded_call
from revnet.engine._saved_samples import CHECKSUM_INTERVAL
from revnet.memory.step._flops import FlopCounter
from revnet.memory.step._live import LiveBytes
from revnet.nn import add_policies
from tests.helpers import all_cases, gradients, squares, stored_twin


def step(module, x, seed=1):
    torch.manual_seed(seed)
    loss = squares(module(x))
    loss.backward()
    return loss


@all_cases
def test_gradients_equal_the_stored_twin_bit_for_bit(case):
    sequence = case.sequence(3, Checkpoint())
    twin = stored_twin(sequence)
    inputs = (case.input(), case.args(), case.kwargs())
    for module, (x, args, kwargs) in ((sequence, inputs), (twin, copy.deepcopy(inputs))):
        torch.manual_seed(1)
        squares(module(x, *args, **kwargs)).backward()
    for (name, gradient), (_, expected) in zip(gradients(sequence).items(), gradients(twin).items(), strict=True):
        assert gradient is expected is None or torch.equal(gradient, expected), name


def test_holds_the_input_of_each_function():
    blocks = [ReversibleBlock(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 8)) for _ in range(5)]
    sequence = ReversibleSequential(*blocks, policy=Checkpoint())
    pair = (torch.randn(16, 8), torch.randn(16, 8))
    with LiveBytes([*sequence.parameters(), *pair]) as counter:
        y = sequence(pair)
        stream = 16 * 8 * 4
        # x2 and y1 of each block; the first x2 belongs to the caller, and the last pair is the output.
        assert counter.live_bytes == (5 - 1) * 2 * stream + 2 * stream + stream - stream
        del y
    assert counter.live_bytes == 0


def test_does_not_recompute_the_last_product_of_a_function():
    def function():
        return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))

    blocks = [ReversibleBlock(function(), function()) for _ in range(3)]
    flops = {}
    for policy in (Store(), Checkpoint()):
        with FlopCounter() as counter:
            squares(ReversibleSequential(*blocks, policy=policy)(torch.randn(2, 8, 5, 5))).backward()
        flops[policy] = counter.flops
    convolution = 2 * 2 * 4 * 4 * 9 * 5 * 5
    assert flops[Checkpoint()] - flops[Store()] == 6 * convolution  # One of two, in each of six functions.


@pytest.mark.parametrize("last", [nn.RReLU(), nn.Dropout(0.5), nn.BatchNorm1d(3), nn.MaxPool1d(1), nn.Sigmoid()])
def test_recomputes_operations_that_save_their_result(last):
    def function():
        return nn.Sequential(nn.Linear(3, 3), copy.deepcopy(last))

    sequence = ReversibleSequential(*[ReversibleBlock(function(), function()) for _ in range(2)], policy=Checkpoint())
    twin = stored_twin(sequence)
    x = torch.randn(4, 6)
    step(sequence, x)
    step(twin, x)
    for name, gradient in gradients(sequence).items():
        assert torch.equal(gradient, gradients(twin)[name]), name


class Stem(nn.Module):
    """A module that is not reversible: it changes the shape, and has batch norm, dropout and two outputs."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 2)

    def forward(self, x, *, scale=None):
        y = self.layers(x)
        return {"features": y if scale is None else y * scale, "logits": [self.head(y)]}


class Checkpointed(nn.Module):
    def __init__(self, stem):
        super().__init__()
        self.stem = stem

    def forward(self, x, **kwargs):
        return checkpointed_call(self.stem, (x,), kwargs)


@pytest.mark.parametrize("x_requires_grad", [True, False])
@pytest.mark.parametrize("with_scale", [True, False])
def test_call_has_the_effects_of_a_plain_call(x_requires_grad, with_scale):
    stem = Stem()
    twin = copy.deepcopy(stem)
    results = []
    values, scale_values = torch.randn(6, 3), torch.randn(8)
    for module in (Checkpointed(stem), twin):
        x = values.clone().requires_grad_(x_requires_grad)
        kwargs = {"scale": scale_values.clone().requires_grad_()} if with_scale else {}
        torch.manual_seed(3)
        out = module(x, **kwargs)
        (squares(out["features"]) + squares(out["logits"][0])).backward(retain_graph=True)
        squares(out["logits"][0]).backward()
        leaves = [x, *kwargs.values(), *module.parameters(), *module.buffers()]
        results.append([torch.get_rng_state(), *[leaf.grad if leaf.requires_grad else leaf for leaf in leaves]])
    for value, expected in zip(*results, strict=True):
        assert torch.equal(value, expected)


def test_call_keeps_only_its_arguments():
    stem = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 4), nn.Tanh(), nn.Linear(4, 4))
    x = torch.randn(8, 4)
    with LiveBytes([*stem.parameters(), x]) as counter:
        y = checkpointed_call(stem, (x,), {})
        assert counter.live_bytes == y.nbytes
        loss = y.sum()
        del y
        assert counter.live_bytes == loss.nbytes
        loss.backward()


def test_call_that_overwrites_its_argument_raises():
    with pytest.raises(RuntimeError, match=r"`Sequential` modified an argument in place.*`inplace=False`"):
        checkpointed_call(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3)), (torch.randn(2, 3),), {})


def test_overwritten_argument_raises_in_the_backward_pass():
    x = torch.randn(2, 3)
    y = checkpointed_call(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), (x,), {})
    x.add_(1)
    with pytest.raises((ReconstructionError, RuntimeError), match="modified"):
        y.sum().backward()


def test_call_without_gradients_is_plain():
    stem = Stem().eval()
    x = torch.randn(2, 3)
    with torch.no_grad():
        assert torch.equal(checkpointed_call(stem, (x,), {})["features"], stem(x)["features"])


def added_policy(layers):
    add_policies(model := nn.Sequential(layers), "0")
    set_policy(model, "checkpoint")
    return model


@pytest.mark.parametrize(
    "wrap", [Checkpointed, added_policy, lambda layers: PolicySequential(*layers, policy=Checkpoint())]
)
def test_parameters_are_read_in_one_call_of_many(wrap, monkeypatch):
    """Reading them takes longer than a small layer. The module that is called may be another one in each call."""
    reads = []
    monkeypatch.setattr(_states, "checksum", reads.append)
    model = wrap(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    for _ in range(CHECKSUM_INTERVAL):
        model(torch.randn(2, 3))
    assert len(reads) == 2 * 4  # before and after the first call
    model(torch.randn(2, 3))
    assert len(reads) == 2 * 2 * 4


class Clamped(nn.Module):
    """Writes to its parameter in each call, without raising its version."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([3.0, -3.0]))

    def forward(self, x):
        y = x * self.scale.tanh()
        self.scale.data.mul_(0.5)
        return y


def test_writes_to_parameters_are_remembered():
    """The first call observes the write; the ones after it keep the value from before."""
    model, twin = PolicySequential(Clamped(), policy=Checkpoint()), Clamped()
    with pytest.raises(ReconstructionError):
        step(model, torch.ones(2, 2))
    step(twin, torch.ones(2, 2))
    for module in (model, twin):
        module.zero_grad()
        step(module, torch.ones(2, 2))
    assert torch.equal(model[0].scale.grad, twin.scale.grad)


def test_call_keeps_no_module_alive():
    layers = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    checkpointed_call(layers, (torch.randn(2, 3),), {}).sum().backward()
    alive = weakref.ref(layers)
    gc.disable()
    try:
        del layers
        assert alive() is None
    finally:
        gc.enable()


def test_compiling_a_call_raises():
    model = Checkpointed(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    with pytest.raises(Exception, match="whose activations are recomputed cannot be compiled as a whole"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(2, 3))


def test_offloads_each_activation_once_and_no_parameters(monkeypatch):
    """A CPU tensor represents a device tensor, since only the copies matter."""
    copies = []
    monkeypatch.setattr("revnet.engine._offload._is_on_host", lambda tensor: False)
    begin = _OnHost.begin
    monkeypatch.setattr(_OnHost, "begin", lambda self: copies.append(self._source) or begin(self))
    linear = nn.Linear(4, 4)
    module = nn.Sequential(linear, nn.ReLU(), nn.Linear(4, 4))
    twin = copy.deepcopy(module)
    x = torch.randn(3, 4)
    y = offloaded_call(module, (x,), {})
    copies = [tensor for tensor in copies if tensor is not None]
    # x, and the output of ReLU, which two operations save; no weight.
    assert [tuple(tensor.shape) for tensor in copies] == [(3, 4), (3, 4)]
    squares(y).backward()
    squares(twin(x)).backward()
    for parameter, expected in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


def test_offloads_memory_that_is_filled_after_it_was_saved(monkeypatch):
    """RReLU saves its noise before it draws it."""
    monkeypatch.setattr("revnet.engine._offload._is_on_host", lambda tensor: False)
    x = torch.randn(3, 4, requires_grad=True)
    gradients = []
    for run in (lambda module: offloaded_call(module, (x,), {}), lambda module: module(x)):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(squares(run(nn.RReLU())), x)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", ["expanded", "windows"])
def test_offloads_tensors_whose_elements_share_memory(monkeypatch, kind):
    monkeypatch.setattr("revnet.engine._offload._is_on_host", lambda tensor: False)
    factor = torch.randn(3, 1).expand(3, 4) if kind == "expanded" else torch.randn(6).unfold(0, 4, 1)
    module = nn.Identity()
    module.forward = lambda x: x * factor
    x = torch.randn(3, 4, requires_grad=True)
    offloaded_call(module, (x,), {}).sum().backward()
    assert torch.equal(x.grad, factor)


def test_writes_to_offloaded_tensors_raise(monkeypatch):
    monkeypatch.setattr("revnet.engine._offload._is_on_host", lambda tensor: False)

    class Overwriting(nn.Module):
        def forward(self, x):
            y = x.sigmoid()
            return y + y.mul_(2)

    y = offloaded_call(Overwriting(), (torch.randn(3, requires_grad=True),), {})
    with pytest.raises(RuntimeError, match="was written to before it was copied to the host"):
        y.sum().backward()


def test_writes_to_kept_tensors_raise():
    sequence = ReversibleSequential(ReversibleBlock(nn.Sigmoid(), nn.Linear(2, 2)), policy=Offload())
    y1, y2 = sequence((torch.randn(3, 2), torch.randn(3, 2, requires_grad=True)))
    y1.add_(1)  # The input of g.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y1 + y2).sum().backward()


def test_rebuilds_fake_streams_in_place_like_real_ones():
    peaks = []
    for mode in (torch.enable_grad(), FakeTensorMode()):
        with mode:
            blocks = [ReversibleBlock(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(3)]
            sequence, x = ReversibleSequential(*blocks), torch.randn(64, 16)
            with LiveBytes([x, *sequence.parameters()]) as counter:
                sequence(x).sum().backward()
        peaks.append(counter.peak_bytes)
    assert peaks[0] == peaks[1]
