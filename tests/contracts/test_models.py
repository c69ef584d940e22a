"""Reversible models equal their stored twins. A new model is tested once it is in the list."""

import copy
import io
import pickle

import pytest
import torch

from revnet import Store
from revnet.memory import measure
from tests.helpers import all_reversible_models, assert_close, assert_same_buffers, gradients, model_input, squares


def make_twin(make_model, model):
    twin = make_model(policy=Store()).double()
    twin.load_state_dict(model.state_dict())
    return twin


def train_step(model, x, seed=1):
    """Return the output and the final random state."""
    torch.manual_seed(seed)
    y = model(x)
    squares(y).backward()
    return y.detach(), torch.get_rng_state()


@all_reversible_models
def test_step_equals_the_twin(make_model):
    model = make_model().double()
    twin = make_twin(make_model, model)
    x = model_input(model)
    x.requires_grad_(x.is_floating_point())
    twin_x = x.detach().clone().requires_grad_(x.requires_grad)
    output, state = train_step(model, x)
    expected, expected_state = train_step(twin, twin_x)
    assert torch.equal(output, expected)
    assert torch.equal(state, expected_state)
    assert_close(gradients(model), gradients(twin), tolerance=1e-8)  # values near 1e3, thirty layers deep
    assert_close(x.grad, twin_x.grad, tolerance=1e-8)
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert_same_buffers(model, twin)


@all_reversible_models
def test_step_in_evaluation_mode_equals_the_twin(make_model):
    model = make_model().double().eval()
    twin = make_twin(make_model, model).eval()
    x = model_input(model)
    output, _ = train_step(model, x)
    expected, _ = train_step(twin, x)
    assert torch.equal(output, expected)
    assert_close(gradients(model), gradients(twin), tolerance=1e-8)


@all_reversible_models
def test_step_needs_less_memory_than_the_twin(make_model):
    model = make_model()
    twin = make_model(policy=Store())
    x = model_input(model)
    x = x.float() if x.is_floating_point() else x
    memory, expected = measure(model, x), measure(twin, x)
    assert memory.activation_bytes < expected.activation_bytes
    assert memory.held_bytes < expected.held_bytes


@all_reversible_models
def test_repeated_steps_equal_the_twin(make_model):
    """The loop includes an optimizer."""
    model = make_model().double()
    twin = make_twin(make_model, model)
    batches = [model_input(model) for _ in range(3)]
    for module in (model, twin):
        torch.manual_seed(1)  # for dropout
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
        for x in batches:
            optimizer.zero_grad()
            module(x).logsumexp(1).sum().backward()
            optimizer.step()
    # Each step amplifies the rounding of the previous one.
    assert_close(dict(model.named_parameters()), dict(twin.named_parameters()), tolerance=1e-7)


COPIES = {
    "deepcopy": lambda model, make_model: copy.deepcopy(model),
    "pickle": lambda model, make_model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model, make_model: load(save(model), weights_only=False),
    "state dict": lambda model, make_model: with_state(make_model().double(), model.state_dict()),
    "saved state dict": lambda model, make_model: with_state(
        make_model().double(), load(save(model.state_dict()), weights_only=True)
    ),
}


def save(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def load(data, *, weights_only):
    return torch.load(io.BytesIO(data), weights_only=weights_only)


def with_state(model, state):
    model.load_state_dict(state)
    return model


@all_reversible_models
@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES.keys())
def test_copy_trains_like_the_model(make_model, make_copy):
    """The copy is made after a step, while the graph is alive, and shares nothing with the model."""
    model = make_model().double()
    loss = squares(model(model_input(model)))
    loss.backward(retain_graph=True)
    other = make_copy(model, make_model)
    assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in model.parameters()}
    x = model_input(model)
    steps = []
    for module in (model, other):
        module.zero_grad()
        steps.append(train_step(module, x))
    assert torch.equal(steps[0][0], steps[1][0])
    assert_close(gradients(other), gradients(model))
    assert_same_buffers(other, model)
