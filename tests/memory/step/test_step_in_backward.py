"""With the optimizer's step in the backward pass, one gradient is alive at a time, and every byte is predicted."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, Adagrad, AdamW

from revnet import Checkpoint, Reverse, ReversibleBlock, ReversibleSequential, Store, set_policy
from revnet.memory import measure, predict
from revnet.memory.step._live import LiveBytes
from revnet.optim import StepInBackward

WIDTH = 64
OPTIMIZERS = {
    "AdamW": AdamW,
    "AdamW for all at once": partial(AdamW, foreach=True),
    "fused AdamW": partial(AdamW, fused=True),
    "SGD with momentum": partial(SGD, lr=0.1, momentum=0.9),
    "Adagrad": Adagrad,
    "Adafactor": Adafactor,
}


def mlp():
    return nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))


def make_model(depth, policy=None):
    model = ReversibleSequential(*[ReversibleBlock(mlp(), mlp(), split_dim=-1) for _ in range(depth)])
    set_policy(model, policy or Reverse())
    return model


def inputs():
    return torch.randn(4, 16, 2 * WIDTH)


def real_peak(model, x, make_optimizer):
    """Return the peak of a second training step, beyond parameters, optimizer state and input."""
    optimizer = make_optimizer(model.parameters())
    StepInBackward(optimizer)

    def step():
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [value for values in optimizer.state.values() for value in values.values() if torch.is_tensor(value)]
    with LiveBytes([*model.parameters(), *state, x]) as live:
        step()
    return live.peak_bytes


@pytest.mark.parametrize("policy", [Reverse(), Store(), Checkpoint()], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_prediction_equals_measurement_and_a_training_step(name, policy):
    model, x, options = make_model(2, policy), inputs(), {"optimizer": OPTIMIZERS[name], "step_in_backward": True}
    predicted = predict(model, x, **options)
    assert predicted == measure(model, x, **options)
    constant = predicted.parameter_bytes + predicted.optimizer_bytes + predicted.input_bytes
    assert predicted.peak_bytes == constant + real_peak(model, x, OPTIMIZERS[name])
    assert predicted.gradient_bytes == 0
    assert predicted.peak_phase == "backward"
    assert predicted.optimizer_bytes == predict(model, x, optimizer=OPTIMIZERS[name]).optimizer_bytes


def test_the_peak_beyond_parameters_and_state_does_not_depend_on_the_depth():
    beyond = {}
    for step_in_backward, depths in ((False, (4, 16)), (True, (4, 16, 64))):
        for depth in depths:
            # Real steps, since fake ones take longer.
            memory = measure(make_model(depth), inputs(), optimizer=AdamW, step_in_backward=step_in_backward)
            beyond[depth, step_in_backward] = memory.peak_bytes - memory.parameter_bytes - memory.optimizer_bytes
    assert beyond[4, True] == beyond[16, True] == beyond[64, True] == 442_888
    # The ordinary step keeps all gradients.
    parameter_bytes = 132_864 * 2 * 4
    assert beyond[16, False] - beyond[4, False] == 3 * parameter_bytes


def test_largest_gradient_at_once():
    """Each gradient is freed before the next one is complete."""
    model, x = make_model(3), inputs()
    timeline = measure(model, x, optimizer=AdamW, step_in_backward=True).timeline
    assert timeline.gradient_bytes.max() == 4 * WIDTH * WIDTH * 4
    assert timeline.optimizer_start == len(timeline)


def test_parameters_that_get_no_gradient_have_no_state():
    model = nn.Sequential(make_model(1), nn.Linear(2 * WIDTH, 2))
    model.register_parameter("unused", nn.Parameter(torch.ones(100)))
    model[1].bias.requires_grad_(False)
    x = inputs()
    for optimizer in (AdamW, AdamW(model[1].parameters())):
        ordinary = predict(model, x, optimizer=optimizer)
        options = {"optimizer": optimizer, "step_in_backward": True}
        memory = predict(model, x, **options)
        assert memory == measure(model, x, **options)
        assert memory.optimizer_bytes == ordinary.optimizer_bytes
    # The gradients of parameters that the optimizer does not have stay.
    assert memory.gradient_bytes == ordinary.gradient_bytes - model[1].weight.numel() * 4


def test_measure_restores_the_parameters():
    model, x = make_model(1), inputs()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    measure(model, x, optimizer=AdamW, step_in_backward=True)
    torch.testing.assert_close([*model.parameters()], before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("function", [predict, measure])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step_in_backward": True}, ValueError, r"`step_in_backward` needs `optimizer` \(=None\)"),
        ({"step_in_backward": 1, "optimizer": SGD}, TypeError, r"`step_in_backward` \(=1\) must be True or False"),
        (
            {"step_in_backward": True, "optimizer": torch.optim.LBFGS},
            NotImplementedError,
            r"`optimizer` \(=LBFGS\) evaluates the loss several times",
        ),
        (
            {"step_in_backward": True, "optimizer": torch.optim.SparseAdam},
            ValueError,
            r"`optimizer` \(=SparseAdam\) cannot step in a backward pass",
        ),
    ],
)
def test_rejects_wrong_arguments(function, options, error, message):
    with pytest.raises(error, match=message):
        function(make_model(1), inputs(), **options)
