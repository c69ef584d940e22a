import gc
import weakref
from dataclasses import fields
from functools import partial

import pytest
import torch
from torch import nn

from revnet import ReversibleSequential
from revnet.memory import measure, predict
from revnet.memory.step._live import LiveBytes
from revnet.memory.step._memory_parts import Breakdown, ModuleMemory
from revnet.memory.step._run_step import losses_of
from tests.helpers import all_cases, all_policies, leaves


def test_a_layer_by_hand():
    """tanh keeps its output; the backward pass adds the expanded gradient of the sum and tanh's gradient."""
    model = nn.Sequential(nn.Linear(100, 50, bias=False), nn.Tanh())
    memory = measure(model, torch.randn(10, 100))
    activation = 10 * 50 * 4
    assert memory.held_bytes == activation + 4  # tanh's output and the loss
    weight_gradient = 50 * 100 * 4
    assert memory.activation_bytes == activation + weight_gradient + 8  # tanh's gradient, the loss and its gradient


# Two linear layers, batch 4: x (4, 100), hidden (4, 50), y (4, 10).
WEIGHT1, WEIGHT2 = 50 * 100 * 4, 10 * 50 * 4
INPUT, HIDDEN, OUTPUT, SCALAR = 4 * 100 * 4, 4 * 50 * 4, 4 * 10 * 4, 4


def two_layers():
    return nn.Sequential(nn.Linear(100, 50, bias=False), nn.Linear(50, 10, bias=False))


def test_two_layers_by_hand():
    memory = measure(two_layers(), torch.randn(4, 100))
    assert memory.parameter_bytes == WEIGHT1 + WEIGHT2
    assert memory.buffer_bytes == memory.optimizer_bytes == 0
    assert memory.input_bytes == INPUT
    assert memory.gradient_bytes == WEIGHT1 + WEIGHT2
    # Between the passes: the hidden layer, which the second layer's gradient needs, and the loss.
    assert memory.held_bytes == HIDDEN + SCALAR
    # The peak: the second layer has its gradient, and the first gets its own from the gradient of the hidden layer. The
    # hidden layer itself is freed; the loss and its gradient are alive.
    transient = WEIGHT1 + HIDDEN + SCALAR
    assert memory.at_peak == Breakdown(
        parameters=WEIGHT1 + WEIGHT2,
        buffers=0,
        optimizer=0,
        inputs=INPUT,
        gradients=WEIGHT2,
        held=SCALAR,
        transient=transient,
    )
    assert memory.peak_bytes == memory.at_peak.total == WEIGHT1 + WEIGHT2 + INPUT + WEIGHT2 + SCALAR + transient
    assert (memory.peak_phase, memory.peak_module) == ("backward", "0")
    assert memory.activation_bytes == SCALAR + transient
    constant = WEIGHT1 + WEIGHT2 + INPUT
    # The second layer's peak: its gradient, not yet its own, and the hidden layer and its gradient.
    second_peak = constant + WEIGHT2 + 2 * HIDDEN + 2 * SCALAR
    assert memory.modules == (
        ModuleMemory("", "Sequential", WEIGHT1 + WEIGHT2, HIDDEN, memory.peak_bytes),
        ModuleMemory("0", "Linear", WEIGHT1, HIDDEN, memory.peak_bytes),
        ModuleMemory("1", "Linear", WEIGHT2, 0, second_peak),
    )


def test_the_timeline_by_hand():
    timeline = measure(two_layers(), torch.randn(4, 100), optimizer=torch.optim.SGD).timeline
    assert timeline.constant_bytes == WEIGHT1 + WEIGHT2 + INPUT
    points = [
        (0, 0, 1),
        (HIDDEN, 0, 1),
        (HIDDEN + OUTPUT, 0, 2),
        (HIDDEN + OUTPUT + SCALAR, 0, -1),  # the loss
        (HIDDEN + SCALAR, 0, -1),  # between the passes
        (HIDDEN + 2 * SCALAR, 0, -1),  # the loss has a gradient, which is also the gradient of the output
        (HIDDEN + 2 * SCALAR + WEIGHT2, 0, 2),  # on its way into `grad`
        (2 * HIDDEN + 2 * SCALAR + WEIGHT2, 0, 2),
        (HIDDEN + 2 * SCALAR + WEIGHT2, 0, 2),
        (HIDDEN + 2 * SCALAR, WEIGHT2, 1),  # there
        (HIDDEN + 2 * SCALAR + WEIGHT1, WEIGHT2, 1),
        (2 * SCALAR + WEIGHT1, WEIGHT2, 1),
        (SCALAR, WEIGHT1 + WEIGHT2, 1),
    ]
    changes = zip(timeline.activation_bytes, timeline.gradient_bytes, timeline.module_indices, strict=True)
    assert [tuple(map(int, point)) for point in changes] == points
    assert timeline.backward_start == 5
    assert timeline.optimizer_start == len(timeline) == len(points)


def test_an_optimizer_by_hand():
    """AdamW: two averages and a step count for each parameter; its step makes a root and a quotient."""
    memory = measure(two_layers(), torch.randn(4, 100), optimizer=torch.optim.AdamW)
    assert memory.optimizer_bytes == 2 * (WEIGHT1 + WEIGHT2) + 2 * SCALAR
    assert memory.peak_phase == "optimizer"
    assert memory.at_peak == Breakdown(
        parameters=WEIGHT1 + WEIGHT2,
        buffers=0,
        optimizer=2 * (WEIGHT1 + WEIGHT2) + 2 * SCALAR,
        inputs=INPUT,
        gradients=WEIGHT1 + WEIGHT2,
        held=SCALAR,
        transient=2 * WEIGHT1,
    )


@pytest.mark.parametrize(
    ("optimizer", "states"),
    [
        (torch.optim.SGD, 0),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1),
        (torch.optim.Adafactor, None),
        (partial(torch.optim.AdamW, lr=torch.tensor(1e-3)), None),
        (torch.optim.ASGD, None),
        (torch.optim.Muon, 1),
    ],
)
def test_other_optimizers(optimizer, states):
    memory = measure(two_layers(), torch.randn(4, 100), optimizer=optimizer)
    if states is None:
        assert memory.optimizer_bytes > 0
    else:
        assert memory.optimizer_bytes == states * (WEIGHT1 + WEIGHT2)


def test_frozen_parameters_have_no_gradient_and_no_state():
    model = two_layers()
    model[0].requires_grad_(False)
    memory = measure(model, torch.randn(4, 100), optimizer=torch.optim.AdamW)
    assert memory.parameter_bytes == WEIGHT1 + WEIGHT2
    assert memory.gradient_bytes == WEIGHT2
    assert memory.optimizer_bytes == 2 * WEIGHT2 + SCALAR


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # by Adagrad
@pytest.mark.parametrize("call", [measure, predict])
def test_sparse_gradients(call):
    """The size of a sparse gradient depends on the values of the inputs, and so do temporaries that it needs."""
    model, tokens = nn.Embedding(100, 8, sparse=True), torch.arange(4)
    memory = call(model, tokens, optimizer=torch.optim.SGD)
    assert (memory.optimizer_bytes, memory.peak_phase) == (0, "forward")
    for optimizer in (torch.optim.SparseAdam, torch.optim.Adagrad, partial(torch.optim.SGD, momentum=0.9)):
        with pytest.raises(
            ValueError, match=r"`optimizer` \(=\w+\) keeps state for a parameter with a sparse gradient"
        ):
            call(model, tokens, optimizer=optimizer)
    with pytest.raises(ValueError, match=r"keeps state for a parameter with a sparse gradient"):
        call(model, tokens, optimizer=torch.optim.Adagrad, step_in_backward=True)
    with pytest.raises(ValueError, match="Adam does not support sparse gradients"):
        call(model, tokens, optimizer=torch.optim.Adam)


def test_buffers_count():
    norm = nn.BatchNorm1d(6)
    assert measure(norm, torch.randn(4, 6)).buffer_bytes == 6 * 4 + 6 * 4 + 8


def test_an_input_that_is_a_slice_counts_alone():
    dataset = torch.randn(1000, 100)
    assert measure(two_layers(), dataset[:4]).input_bytes == INPUT
    assert measure(two_layers(), torch.randn(1, 100).expand(4, 100)).input_bytes == 100 * 4


# Against an independent count -----------------------------------------------------------------------------------------


def counted(model, args, kwargs):
    """Return the peak and the held bytes, beyond constants, as `LiveBytes` counts them without a recorder.

    The gradients exist beforehand, so that the backward pass adds to them.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters()]
    inputs = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in leaves((args, kwargs))]
    with LiveBytes([*model.parameters(), *gradients, *model.buffers(), *inputs]) as counter:
        losses = losses_of(model(*args, **kwargs), None)
        held_bytes = counter.live_bytes
        torch.autograd.backward(losses)
    return counter.peak_bytes, held_bytes


@all_policies
@all_cases
def test_recording_does_not_change_the_bytes(case, policy):
    sequence = case.sequence(4, policy)
    args, kwargs = (case.input(), *case.args()), case.kwargs()
    memory = measure(sequence, *args, kwargs=kwargs)
    assert (memory.activation_bytes, memory.held_bytes) == counted(sequence, args, kwargs)


@all_cases
def test_the_peak_is_the_maximum_of_the_timeline(case):
    sequence = ReversibleSequential(*case.sequence(2))
    memory = measure(sequence, case.input(), *case.args(), kwargs=case.kwargs())
    timeline = memory.timeline
    total = timeline.constant_bytes + timeline.activation_bytes + timeline.gradient_bytes
    assert memory.peak_bytes == total.max() == memory.at_peak.total
    assert memory.activation_bytes == timeline.activation_bytes.max()
    constant = memory.parameter_bytes + memory.buffer_bytes + memory.input_bytes
    assert timeline.constant_bytes == constant
    assert memory.gradient_bytes == timeline.gradient_bytes[-1] == memory.parameter_bytes
    parts = [getattr(memory.at_peak, field.name) for field in fields(Breakdown)]
    assert min(parts) >= 0


def test_parameters_with_hooks():
    """A hook may replace the gradient or remove it."""
    model, x = two_layers(), torch.randn(4, 100)
    plain = measure(model, x)
    calls = []
    handle = model[1].weight.register_post_accumulate_grad_hook(calls.append)
    assert measure(model, x) == plain
    assert len(calls) == 1
    handle.remove()
    model[1].weight.register_hook(lambda grad: grad * 2)
    assert measure(model, x).gradient_bytes == plain.gradient_bytes

    def forget(parameter):
        parameter.grad = None

    model[0].weight.register_post_accumulate_grad_hook(forget)
    assert measure(model, x).gradient_bytes == WEIGHT2


def test_hooks_of_modules_run_and_remain():
    model, x = two_layers(), torch.randn(4, 100)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[1].register_full_backward_hook(lambda *_: calls.append("backward"))
    measure(model, x)
    assert calls == ["forward", "backward"]
    assert len(model[0]._forward_hooks) == 1
    assert not model[1]._forward_hooks


def test_restores_the_model_after_an_exception():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.register_buffer("rebound", torch.zeros(3))

        def forward(self, x):
            self.rebound = self.rebound + 1
            y = self.norm(x + torch.rand(3))
            raise KeyError("lost")
            return y

    model = Fails()
    model.norm.weight.grad = torch.ones(3)
    state, rebound = torch.get_rng_state(), model.rebound
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(KeyError, match="lost"):
        measure(model, torch.randn(4, 3, generator=torch.Generator()))
    assert model.rebound is rebound
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(model.norm.weight.grad, torch.ones(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.norm._forward_hooks
    assert model.norm.weight._post_accumulate_grad_hooks is None


@pytest.mark.parametrize("call", [measure, predict])
def test_keeps_no_tensor_alive(call):
    """All tensors are freed at once, without the garbage collector."""
    model, x = two_layers(), torch.randn(4, 100)
    storages = [weakref.ref(tensor.untyped_storage()) for tensor in [x, *model.parameters()]]
    gc.collect()
    gc.disable()
    try:
        memory = call(model, x, optimizer=torch.optim.AdamW)
        del model, x
        assert [storage() for storage in storages] == [None] * 3
    finally:
        gc.enable()
    assert memory.peak_bytes > 0


def test_autocast_covers_the_forward_pass_alone():
    """The backward pass runs outside of it, as PyTorch recommends, and cached casts are ignored."""
    model, x = two_layers(), torch.randn(4, 100)
    expected = measure(model, x, autocast=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        # Here autocast outlives the step and caches its casts; the cast of the second layer is held in any case.
        assert measure(model, x).held_bytes == expected.held_bytes + WEIGHT1 // 2
    with pytest.raises(ValueError, match=r"`autocast` \(=torch.bfloat16\) is not possible on the meta device; use "):
        measure(model.to("meta"), x.to("meta"), autocast=torch.bfloat16)


# The table ------------------------------------------------------------------------------------------------------------


def test_the_report():
    memory = measure(two_layers(), torch.randn(4, 100))
    assert str(memory) == memory.report()
    assert memory.report().splitlines() == [
        "peak 45.3 KiB, in the backward pass, in `0`",
        "",
        "at the peak",
        "  parameters                21.5 KiB  47 %",
        "  inputs                     1.6 KiB   3 %",
        "  gradients                  2.0 KiB   4 %",
        "  activations, held              4 B  <1 %",
        "  activations, transient    20.3 KiB  45 %",
        "activations alone, at most  20.3 KiB",
        "held between the passes        804 B",
        "",
        "module       kind        parameters   held      peak",
        "(the model)  Sequential    21.5 KiB  800 B  45.3 KiB",
        "0            Linear        19.5 KiB  800 B  45.3 KiB",
        "1            Linear         2.0 KiB    0 B  26.6 KiB",
    ]
    assert memory.report(depth=0).splitlines()[-1].startswith("(the model)")
    with pytest.raises(ValueError, match=r"`depth` \(=-1\) must be a number of levels of modules, 0 or more"):
        memory.report(depth=-1)
