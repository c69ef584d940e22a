"""Flow steps: equal to the layers that they replace, normalized once, and constant in memory."""

import copy

import pytest
import torch
from torch import nn

from revnet import FixedPoint, ReversibleSequential, Store, set_policy
from revnet.coupling import Additive, Affine
from revnet.memory import measure
from revnet.nn import (
    ActNorm,
    Checkpoint,
    CouplingLayer,
    FlowStep,
    InvertibleConv1x1,
    InvertibleSequential,
    Offload,
    Reverse,
    SpaceToDepth,
    initialize_act_norms,
)
from tests.helpers import assert_close, gradients


class ScalingConv(nn.Sequential):
    def __init__(self, num_channels):
        super().__init__(nn.Conv2d(num_channels, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 2 * num_channels, 1))


def steps(depth, num_channels=4, **options):
    return [
        FlowStep(ScalingConv(num_channels // 2), num_channels=num_channels, updates=index % 2, **options)
        for index in range(depth)
    ]


def flow(depth=3, policy="reverse"):
    return InvertibleSequential(SpaceToDepth(), *steps(depth), policy=policy)


def small_step():
    return FlowStep(nn.Conv2d(2, 4, 1), num_channels=4)


def images(num_images=8, side=8, dtype=torch.float64):
    return 3 * torch.randn(num_images, 1, side, side, dtype=dtype) + 1


def loss_of(output):
    y, log_det = output
    return y.square().sum() - log_det.sum()


class WithLogDet(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.forward_with_log_det(x)


def test_equals_the_layers_one_after_the_other():
    """The step is `ActNorm`, a 1x1 convolution and a coupling layer; its matrix is put into the convolution."""
    (step,) = steps(1)
    step = step.double()
    for parameter in step.parameters():
        nn.init.normal_(parameter, std=0.5)
    norm = ActNorm(4).double()
    conv = InvertibleConv1x1(4).double()
    with torch.no_grad():
        norm.log_scale.copy_(torch.cat((step.norm1.log_scale, step.norm2.log_scale)))
        norm.bias.copy_(torch.cat((step.norm1.bias, step.norm2.bias)))
        # The step without norm and coupling, applied to the columns of the identity.
        bare = copy.deepcopy(step)
        for parameter in (*bare.norm1.parameters(), *bare.norm2.parameters(), *bare.f.parameters()):
            parameter.zero_()
        matrix = bare(torch.eye(4, dtype=torch.float64)[:, :, None, None])[:, :, 0, 0].T
        permutation, lower, upper = torch.linalg.lu(matrix)
        conv.permutation.copy_(permutation.argmax(1))
        conv.lower.copy_(lower.tril(-1))
        conv.upper.copy_(upper.triu(1))
        conv.signs.copy_(upper.diagonal().sign())
        conv.log_scale.copy_(upper.diagonal().abs().log())
    plain = InvertibleSequential(norm, conv, CouplingLayer(step.f, coupling=Affine()))
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    y, log_det = step.forward_with_log_det(x)
    expected, expected_log_det = plain.forward_with_log_det(x)
    assert_close(y, expected, tolerance=1e-11)
    assert_close(log_det, expected_log_det, tolerance=1e-11)


@pytest.mark.parametrize("num_channels", [2, 8, 64])
def test_starts_as_a_rotation(num_channels):
    (step,) = steps(1, num_channels)
    nn.init.zeros_(step.f[-1].weight)
    nn.init.zeros_(step.f[-1].bias)
    step = step.double()
    x = torch.randn(5, num_channels, 2, 2, dtype=torch.float64)
    y, log_det = step.forward_with_log_det(x)
    # The parameters are rounded to float32.
    assert_close(y.norm(dim=1), x.norm(dim=1), tolerance=1e-5)
    assert_close(log_det, torch.zeros(5, dtype=torch.float64), tolerance=1e-4)


def test_first_batch_is_normalized_once():
    model = InvertibleSequential(*steps(2, mixes=False)).double()
    x = 5 * torch.randn(16, 4, 6, 6, dtype=torch.float64) - 2
    initialize_act_norms(model, x)
    first = model.layers[0][0]
    assert first.is_initialized
    nn.init.zeros_(first.f[-1].weight)
    nn.init.zeros_(first.f[-1].bias)
    y = first(x)
    assert_close(y.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), tolerance=1e-12)
    assert_close(y.std((0, 2, 3), correction=0), torch.ones(4, dtype=torch.float64), tolerance=1e-5)  # epsilon
    before = copy.deepcopy(model.state_dict())
    initialize_act_norms(model, 7 * x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_initialization_is_part_of_the_state_and_leaves_no_hooks():
    model, other = flow(), flow()
    initialize_act_norms(model, images(dtype=torch.float32))
    other.load_state_dict(model.state_dict())
    before = copy.deepcopy(other.state_dict())
    initialize_act_norms(other, images(dtype=torch.float32))
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_initialization_of_a_compiled_model():
    model, twin = flow(), flow()
    twin.load_state_dict(model.state_dict())
    x = images(dtype=torch.float32)
    compiled = torch.compile(model, backend="eager")
    initialize_act_norms(compiled, x)
    initialize_act_norms(twin, x)
    # Only rounding may differ, with a margin of 1,000.
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, twin.state_dict()[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-4)


def test_a_constant_channel_gets_a_finite_scale():
    norm = ActNorm(2)
    initialize_act_norms(norm, torch.ones(4, 2, 3, 3))
    assert norm(torch.ones(1, 2, 1, 1)).isfinite().all()


def test_inverse_restores_the_images_after_training_steps():
    model = flow(8).double()
    x = images()
    initialize_act_norms(model, x)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(5):
        loss = loss_of(model.forward_with_log_det(x)) / x.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    y = model(x)
    # One step in the direction of each rounding shows by how much the inverse amplifies it.
    amplified = (model.inverse(y * (1 + 2**-52)) - model.inverse(y)).abs().max()
    assert (model.inverse(y) - x).abs().max() <= 100 * amplified.clamp(min=2**-50)


@pytest.mark.parametrize("policy", [Reverse(), Checkpoint(), Offload()], ids=repr)
def test_gradients_equal_plain_autograd(policy):
    model = flow(4).double()
    x = images()
    initialize_act_norms(model, x)
    expected = {}
    for chosen in (Store(), policy):
        set_policy(model, chosen)
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        loss_of(model.forward_with_log_det(leaf)).backward()
        found = {**gradients(model), "x": leaf.grad}
        if chosen == Store():
            expected = found
    assert_close(found, expected)


@pytest.mark.parametrize("with_log_det", [False, True])
def test_memory_does_not_grow_with_the_number_of_steps(with_log_det):
    def activation_bytes(depth, policy="reverse"):
        model = flow(depth, policy)
        model = WithLogDet(model) if with_log_det else model
        loss = loss_of if with_log_det else (lambda y: y.square().sum())
        return measure(model, images(2, 16, torch.float32), loss=loss).activation_bytes

    assert activation_bytes(2) == activation_bytes(4) == activation_bytes(16)
    assert activation_bytes(16, "store") > 4 * activation_bytes(16)


def test_a_step_has_one_schedule():
    model = ReversibleSequential(*steps(2))
    schedule = model._schedule()
    assert model._schedule() is schedule
    model[1].updates = 0
    assert model._schedule() is not schedule


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: FlowStep(nn.Linear(1, 2), num_channels=3),
            ValueError,
            r"`num_channels` \(=3\) must be even, .*Space",
        ),
        (lambda: FlowStep(nn.Linear(1, 2), num_channels=4, updates=2), ValueError, r"`updates` \(=2\) must be 0"),
        (lambda: FlowStep(nn.Linear(1, 2), num_channels=4, mixes=1), TypeError, r"`mixes` \(=1\) must be True"),
        (
            lambda: FlowStep(nn.Linear(1, 2), num_channels=4, coupling=FixedPoint()),
            ValueError,
            r"`coupling` \(=FixedPoint\(.*\)\) is exact only on the points of a grid",
        ),
        (lambda: initialize_act_norms(ActNorm(2), x=torch.full((1, 2), torch.nan)), ValueError, "all of them finite"),
        (lambda: initialize_act_norms(ActNorm(2), 1j * torch.ones(3, 2)), TypeError, "`x` has dtype torch.complex64"),
        (lambda: initialize_act_norms(small_step(), 1j * torch.ones(3, 4)), TypeError, "`x` has dtype torch.complex64"),
        (lambda: initialize_act_norms(flow(), torch.zeros(0, 1, 4, 4)), ValueError, r"`x` .* must have values"),
        (lambda: initialize_act_norms(nn.Linear(2, 2)), ValueError, r"`model` \(=Linear\) has no `ActNorm`"),
        # Parameters of one channel would broadcast, and the log-determinant would be wrong.
        (
            lambda: FlowStep(nn.Linear(2, 4), num_channels=2, mixes=False)(torch.ones(2, 4)),
            ValueError,
            r"`norm1` is built for 2 channels, 1 in each stream, but a stream is of shape \(2, 2\); pass `num_",
        ),
        (
            lambda: InvertibleSequential(small_step(), small_step())(torch.ones(2, 2, 3, 3)),
            ValueError,
            r"`blocks.0.norm1` is built for 4 channels, 2 in each stream, but a stream is of shape \(2, 1, 3, 3\)",
        ),
        (
            lambda: FlowStep(nn.Conv2d(2, 4, 1), num_channels=2).inverse(torch.ones(2, 4, 3, 3)),
            ValueError,
            "`FlowStep` is built for 2 channels, 1 in each",
        ),
        (lambda: small_step().initialize(torch.ones(5, 2, 3, 3)), ValueError, r"`x1` .* must be \(B, 2, \.\.\.\)"),
        (lambda: small_step()(torch.ones(2, 4, 3, 3) * 1j), TypeError, "`norm1` got .*complex64, but a `FlowStep`"),
    ],
)
def test_rejects_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_additive_steps_have_the_log_determinant_of_norm_and_matrix():
    (step,) = [FlowStep(nn.Conv2d(2, 2, 1), num_channels=4, coupling=Additive())]
    initialize_act_norms(step, torch.randn(8, 4, 3, 3))
    log_scales = [step.norm1, step.norm2, step.mix1, step.mix2]
    expected = 9 * sum(module.log_scale.sum() for module in log_scales)
    assert_close(step.log_det(torch.randn(2, 4, 3, 3)), expected.expand(2), tolerance=1e-5)


def test_parameters_are_contiguous():
    """FSDP shards only contiguous parameters."""
    assert all(parameter.is_contiguous() for parameter in steps(1, 8)[0].parameters())
