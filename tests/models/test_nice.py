import math

import pytest
import torch
from torch import nn

from revnet import FixedPoint, Store, set_coupling
from revnet.memory import measure
from revnet.models import NICE
from revnet.models._prior import GaussianPrior, LogisticPrior
from tests.helpers import assert_close, gradients

SHAPE = (1, 3, 4)


def make(image_shape=SHAPE, **options):
    """Return a small model with random weights, since the last layer of each coupling is initialized to zero."""
    model = NICE(image_shape=image_shape, **{"hidden_dim": 8, "num_hidden": 2, **options}).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def images(image_shape=SHAPE, num_images=3):
    return torch.rand(num_images, *image_shape, dtype=torch.float64)


def test_default_is_the_network_of_the_paper():
    with torch.device("meta"):
        model = NICE(image_shape=(1, 28, 28))
    coupling = (392 + 1) * 1000 + 4 * (1000 + 1) * 1000 + (1000 + 1) * 392
    assert sum(parameter.numel() for parameter in model.parameters()) == 4 * coupling + 784 == 19_158_352


@pytest.mark.parametrize("image_shape", [SHAPE, (1, 3, 3), (3, 2, 2), (1, 1, 2)])
def test_inverse_restores_images(image_shape):
    model = make(image_shape, num_couplings=8)
    x = images(image_shape)
    z, _ = model(x)
    assert z.shape == (3, math.prod(image_shape))
    assert_close(model.inverse(z), x, tolerance=1e-12)  # a few roundings of float64 per coupling


def test_round_trip_in_float32():
    model = NICE(image_shape=(3, 32, 32), hidden_dim=64)
    nn.init.normal_(model.log_scale, std=0.3)
    for block in model.couplings:
        for function in (block.f, block.g):
            nn.init.normal_(function[-1].weight, std=0.3)  # residuals of the size of the images
    x = images((3, 32, 32)).float()
    assert (model.inverse(model(x)[0]) - x).abs().max() < 3e-5  # float32 rounds by 6e-8


def test_round_trip_in_fixed_point_is_exact():
    model = make(num_couplings=8).float()
    set_coupling(model, FixedPoint(14))
    x = torch.randint(2**14, (5, *SHAPE)) / 2**14
    with torch.no_grad():
        # The rounding of the final scaling is far below half a step of the grid, to which the inverse rounds.
        assert torch.equal(model.inverse(model(x)[0]), x)


@pytest.mark.parametrize("image_shape", [SHAPE, (1, 3, 3)])
@pytest.mark.parametrize("prior", ["logistic", "gaussian"])
def test_density_equals_the_jacobian_of_autograd(image_shape, prior):
    model = make(image_shape, prior=prior)
    x = images(image_shape)
    z, log_det = model(x)
    assert log_det.shape == (3,)
    law = {
        "gaussian": torch.distributions.Normal(0, 1).log_prob,
        "logistic": lambda z: torch.sigmoid(z).log() + torch.sigmoid(-z).log(),
    }[prior]
    for index in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda image: model(image[None])[0][0], x[index])
        expected = jacobian.view(z.shape[1], -1).slogdet().logabsdet
        assert_close(log_det[index], expected, tolerance=1e-12)
        assert_close(model.log_prob(x)[index], law(z[index]).sum() + expected, tolerance=1e-12)


@pytest.mark.parametrize(("prior", "reach"), [("logistic", 60), ("gaussian", 20)])
def test_density_integrates_to_one(prior, reach):
    model = make((1, 1, 2), prior=prior)
    side = torch.linspace(-reach, reach, 1001, dtype=torch.float64)
    grid = torch.cartesian_prod(side, side).view(-1, 1, 1, 2)
    with torch.no_grad():
        density = model.log_prob(grid).exp()
    # The sum over a grid has second-order accuracy, and the density has kinks from ReLU.
    assert density.sum() * (side[1] - side[0]) ** 2 == pytest.approx(1, abs=1e-3)


def test_coupling_layers_alternate():
    """Compare with equations 5 to 7 of the paper, with odd and even components as the halves."""
    model = make()
    x = images()
    odd, even = x.flatten(1)[:, ::2], x.flatten(1)[:, 1::2]
    for block in model.couplings:
        odd = odd + block.f(even)
        even = even + block.g(odd)
    assert torch.equal(model(x)[0], torch.cat((odd, even), 1) * model.log_scale.exp())


def test_starts_as_the_identity():
    model = NICE(image_shape=SHAPE, hidden_dim=8).double()
    x = images()
    z, log_det = model(x)
    assert torch.equal(z, torch.cat((x.flatten(1)[:, ::2], x.flatten(1)[:, 1::2]), 1))
    assert torch.equal(log_det, torch.zeros(3, dtype=torch.float64))


def test_step_equals_the_stored_twin():
    model = make(num_couplings=8)
    twin = make(num_couplings=8, policy=Store())
    twin.load_state_dict(model.state_dict())
    x = images()
    for module in (model, twin):
        (-module.log_prob(x).mean()).backward()
    assert torch.equal(model.log_prob(x), twin.log_prob(x))
    assert_close(gradients(model), gradients(twin))


def test_memory_is_flat_in_the_number_of_couplings():
    def activation_bytes(num_couplings, policy=None):
        model = NICE(image_shape=SHAPE, num_couplings=num_couplings, hidden_dim=64, policy=policy)
        loss = lambda output: output[0].square().sum() - output[1].sum()  # noqa: E731
        return measure(model, torch.rand(16, *SHAPE), loss=loss).activation_bytes

    assert activation_bytes(4) == activation_bytes(8) == activation_bytes(32)
    assert activation_bytes(32, Store()) > 4 * activation_bytes(32)


def test_samples_follow_the_density():
    """Mean and deviation of the codes equal the prior's, within 5 standard errors."""
    model = make()
    generator = torch.Generator().manual_seed(0)
    x = model.sample(4000, generator=generator)
    assert x.shape == (4000, *SHAPE)
    assert not x.requires_grad
    z = model(x)[0].detach()
    deviation = math.pi / math.sqrt(3)
    assert z.mean().abs() < 5 * deviation / math.sqrt(z.numel())
    assert z.std() == pytest.approx(deviation, rel=5 / math.sqrt(z.numel()))


def test_samples_follow_the_generator_and_the_temperature():
    model = make()

    def draw(**options):
        return model.sample(2, generator=torch.Generator().manual_seed(1), **options)

    assert torch.equal(draw(), draw())
    assert_close(model(draw(temperature=0.5))[0], 0.5 * model(draw())[0], tolerance=1e-12)
    origin = model.inverse(torch.zeros(1, 12, dtype=torch.float64))
    assert_close(draw(temperature=0), origin.expand(2, *SHAPE), tolerance=1e-12)


@pytest.mark.parametrize("prior", [LogisticPrior(), GaussianPrior()])
def test_prior_samples_follow_its_density(prior):
    z = torch.linspace(-4, 4, 17, dtype=torch.float64).requires_grad_()
    u = torch.sigmoid(z) if isinstance(prior, LogisticPrior) else torch.special.ndtr(z)
    assert_close(prior.from_uniform(u), z)
    (density,) = torch.autograd.grad(u.sum(), z)
    assert_close(prior.log_prob(z), density.log())


@pytest.mark.parametrize("mask", [torch.ones(1, 3, 4, dtype=torch.bool), torch.ones(3, 4), torch.ones(3, 1, 3, 4)])
def test_inpainting_raises_the_density_and_keeps_known_pixels(mask):
    model = make()
    mask = mask.clone()
    mask[..., 2:] = 0
    x = images()
    before = x.clone()
    start, end = (
        model.inpaint(x, mask, num_steps=steps, step_size=0.01, noise=0, generator=torch.Generator().manual_seed(0))
        for steps in (1, 100)
    )
    assert torch.equal(x, before)
    assert torch.equal(end[..., :2], x[..., :2])
    assert ((end >= 0) & (end <= 1)).all()
    assert (model.log_prob(end) >= model.log_prob(start)).all()
    assert not end.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_inpainting_does_not_read_missing_pixels():
    model = make()
    x = images()
    mask = torch.tensor([True, True, False, False]).expand(3, 4)

    def fill(x):
        with torch.inference_mode():
            return model.inpaint(x, mask, num_steps=3, generator=torch.Generator().manual_seed(0))

    assert torch.equal(fill(x), fill(torch.where(mask, x, torch.nan)))


def test_bits_per_dim_of_uniform_images():
    """With density one on [0, 1], each of 16 levels has 4 bits."""
    model = make()
    assert_close(model.bits_per_dim(torch.zeros(2, dtype=torch.float64), 16), torch.full((2,), 4.0).double())
    log_prob = torch.tensor([12 * math.log(2)], dtype=torch.float64)  # twice the density, per component
    assert_close(model.bits_per_dim(log_prob, 16), torch.tensor([3.0]).double())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_shape": (8, 8)}, ValueError, r"`image_shape` \(=\(8, 8\)\) must be \(C, H, W\)"),
        ({"image_shape": (1, 0, 8)}, ValueError, r"`image_shape\[1\]` \(=0\) must be a positive"),
        ({"image_shape": (1, 1, 1)}, ValueError, "must have at least two components"),
        ({"num_couplings": 3}, ValueError, r"`num_couplings` \(=3\) must be even.*use 4"),
        ({"num_couplings": 0}, ValueError, r"`num_couplings` \(=0\) must be a positive"),
        ({"prior": "uniform"}, ValueError, "`prior` .* must be 'logistic' or 'gaussian'"),
        ({"policy": "x"}, ValueError, "`policy` .* must be a policy"),
    ],
)
def test_rejects_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        NICE(**{"image_shape": SHAPE, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m(torch.rand(2, 1, 4, 4)), ValueError, r"`x` \(of shape \(2, 1, 4, 4\)\) must be \(B, 1, 3, 4\)"),
        (lambda m: m(torch.rand(1, 3, 4)), ValueError, r"`x` .* must be \(B, 1, 3, 4\)"),
        (
            lambda m: m(torch.ones(2, *SHAPE, dtype=torch.uint8)),
            TypeError,
            "dtype torch.uint8.*add uniform noise, and divide gray levels",
        ),
        (
            lambda m: m.inverse(torch.ones(2, 12).long()),
            TypeError,
            "`z` has dtype torch.int64, but must be floating-poi",
        ),
        (
            lambda m: m.float().inverse(torch.rand(2, 12).double()),
            TypeError,
            r"`z` has dtype torch.float64, but the weights of the model have torch.float32; pass `z.float\(\)`, or",
        ),
        (lambda m: m.inverse(torch.rand(2, 11)), ValueError, r"`z` \(of shape \(2, 11\)\) must be \(B, 12\)"),
        (lambda m: m.sample(0), ValueError, r"`num_samples` \(=0\)"),
        (lambda m: m.sample(1, temperature=-1), ValueError, r"`temperature` \(=-1\) must be a finite number"),
        (lambda m: m.inpaint(images(), torch.ones(5)), ValueError, r"`mask` \(of shape \(5,\)\) must have the shape"),
        (lambda m: m.inpaint(images(), torch.ones(4), num_steps=0), ValueError, r"`num_steps` \(=0\)"),
        (lambda m: m.bits_per_dim(torch.zeros(1), 0), ValueError, r"`num_levels` \(=0\)"),
    ],
)
def test_rejects_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(make())
