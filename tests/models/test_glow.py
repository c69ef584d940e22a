"""Glow and RealNVP: inverse, density, gradients and memory."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from revnet import ReversibleSequential, Store, set_policy
from revnet.memory import measure
from revnet.models import NICE, Glow, RealNVP
from revnet.models.glow import code_shapes
from revnet.models.realnvp import CheckerboardCoupling, _color_order, _from_colors, _to_colors
from revnet.nn import Checkpoint, FlowStep, Offload, Reverse, SpaceToDepth, initialize_act_norms
from tests.helpers import assert_close, gradients

SHAPE = (1, 8, 8)
FLOWS = {
    "glow": partial(Glow, num_scales=2, num_steps=2, hidden_dim=4),
    "realnvp": partial(RealNVP, num_scales=2, hidden_dim=4, num_blocks=1),
}
all_flows = pytest.mark.parametrize("make_flow", FLOWS.values(), ids=FLOWS.keys())
DEPTH_OF = {Glow: "num_steps", RealNVP: "num_couplings"}


def images(image_shape=SHAPE, num_images=3, dtype=torch.float64):
    return torch.rand(num_images, *image_shape, dtype=dtype)


def make(make_flow, image_shape=SHAPE, **options):
    """Return an initialized model with random weights, since the last layer of each coupling is initialized to zero."""
    model = make_flow(image_shape=image_shape, **options).double()
    for step in model.modules():
        if isinstance(step, FlowStep):
            for parameter in step.f.parameters():
                nn.init.normal_(parameter, std=0.15)
    initialize_act_norms(model, images(image_shape, 16))
    return model


@pytest.mark.parametrize(
    ("make_model", "expected"),
    [
        # Number of parameters for one scale with channels c, halves h: norms 2 c, matrix c^2, convolutions.
        (
            partial(Glow, num_scales=1, num_steps=1, hidden_dim=512),
            8 + 16 + 9 * 2 * 512 + 512 + 512**2 + 512 + 9 * 512 * 4 + 4,
        ),
        (partial(RealNVP, num_scales=1, num_couplings=1, hidden_dim=8, num_blocks=1), 2 * (8 + 80 + 2 * 584 + 18)),
    ],
    ids=["glow", "realnvp"],
)
def test_number_of_parameters(make_model, expected):
    with torch.device("meta"):
        model = make_model(image_shape=(1, 4, 4))
    diagonals = sum(
        module.log_scale.numel() for name, module in model.named_modules() if name.endswith(("mix1", "mix2"))
    )
    # The diagonal of a triangular factor is stored as its logarithm, next to the matrix.
    assert sum(parameter.numel() for parameter in model.parameters()) - diagonals == expected


def test_default_is_the_network_of_the_paper():
    with torch.device("meta"):
        glow, realnvp = Glow(image_shape=(3, 32, 32)), RealNVP(image_shape=(3, 32, 32))
    assert [len(scale.layers[1]) for scale in glow.flow.scales] == [32, 32, 32]
    steps = [
        [len(layer) for layer in scale.layers if isinstance(layer, ReversibleSequential)]
        for scale in realnvp.flow.scales
    ]
    assert steps == [[3, 3], [4]]


@all_flows
@pytest.mark.parametrize("image_shape", [SHAPE, (3, 4, 12)])
def test_inverse_restores_images(make_flow, image_shape):
    model, x = make(make_flow, image_shape), images(image_shape)
    z, _ = model(x)
    assert z.shape == (3, x[0].numel())
    assert_close(model.inverse(z), x, tolerance=1e-12)  # a few roundings of float64 per step


@all_flows
def test_round_trip_in_float32(make_flow):
    model, x = make(make_flow).float(), images(dtype=torch.float32)
    with torch.no_grad():
        assert (model.inverse(model(x)[0]) - x).abs().max() < 1e-4  # float32 rounds by 6e-8


@all_flows
def test_log_determinant_equals_the_jacobian_of_autograd(make_flow):
    model, x = make(make_flow), images()
    z, log_det = model(x)
    normal = torch.distributions.Normal(0, 1)
    for index in range(len(x)):
        jacobian = torch.autograd.functional.jacobian(lambda image: model(image[None])[0][0], x[index])
        expected = jacobian.view(64, 64).slogdet().logabsdet
        # A determinant rounds by a unit in the last place for each of the 64 pivots, times the condition of the matrix.
        # The margin of 100 leaves room for the sums of logarithms, which round, too.
        condition = torch.linalg.cond(jacobian.view(64, 64))
        assert (log_det[index] - expected).abs() <= 100 * 64 * condition * torch.finfo(torch.float64).eps
        assert_close(model.log_prob(x)[index], normal.log_prob(z[index]).sum() + expected, tolerance=1e-10)


@all_flows
@pytest.mark.parametrize("policy", [Reverse(), Checkpoint(), Offload()], ids=repr)
def test_step_equals_the_stored_twin(make_flow, policy):
    model, x = make(make_flow), images()
    twin = copy.deepcopy(model)
    set_policy(model, policy)
    set_policy(twin, Store())
    for module in (model, twin):
        (-module.log_prob(x).mean()).backward()
    assert torch.equal(model.log_prob(x), twin.log_prob(x))
    assert_close(gradients(model), gradients(twin))


@all_flows
def test_memory_is_flat_in_the_depth_of_a_scale(make_flow):
    def activation_bytes(depth, policy=None):
        model = make_flow(image_shape=SHAPE, policy=policy, **{DEPTH_OF[make_flow.func]: depth})
        loss = lambda output: output[0].square().sum() - output[1].sum()  # noqa: E731
        return measure(model, images(num_images=4, dtype=torch.float32), loss=loss).activation_bytes

    assert activation_bytes(2) == activation_bytes(4) == activation_bytes(8)
    assert activation_bytes(8, Store()) > 4 * activation_bytes(8)


@all_flows
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_samples_in_low_precision(make_flow, dtype):
    samples = make_flow(image_shape=SHAPE).to(dtype).sample(2)
    assert samples.shape == (2, *SHAPE)
    assert samples.isfinite().all()


@all_flows
def test_samples_follow_the_generator_and_the_temperature(make_flow):
    model = make(make_flow)

    def draw(**options):
        return model.sample(2, generator=torch.Generator().manual_seed(1), **options)

    assert draw().shape == (2, *SHAPE)
    assert torch.equal(draw(), draw())
    origin = model.inverse(torch.zeros(1, 64, dtype=torch.float64))
    assert_close(draw(temperature=0), origin.expand(2, *SHAPE), tolerance=1e-12)


@all_flows
def test_inpainting_keeps_the_known_pixels(make_flow):
    model, x = make(make_flow), images()
    known = torch.ones(8, 8, dtype=torch.bool)
    known[:4] = False
    filled = model.inpaint(x, known, num_steps=2, step_size=1e-4)
    assert torch.equal(filled[..., 4:, :], x[..., 4:, :])
    assert not torch.equal(filled[..., :4, :], x[..., :4, :])


def test_codes_have_the_shapes_of_the_scales():
    codes = make(FLOWS["glow"]).flow(images())
    assert [tuple(code.shape[1:]) for code in codes] == code_shapes(SHAPE, 2) == [(2, 4, 4), (8, 2, 2)]


def test_colors_of_the_checkerboard():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    board = torch.tensor([[1, 0], [0, 1]]).repeat(2, 2).bool()
    first, second = _to_colors(x)
    assert set(first.flatten().tolist()) == set(x[0, 0][board].tolist())
    assert torch.equal(_from_colors(first, second), x)
    assert torch.equal(SpaceToDepth()(x)[:, _color_order(1)], torch.cat((first, second), 1))


@pytest.mark.parametrize("updates", [0, 1])
def test_checkerboard_coupling_reads_one_color(updates):
    """The network sees the masked image, as in equation 9 of the paper."""
    coupling = CheckerboardCoupling(1, updates=updates, hidden_dim=4, num_blocks=1)
    for parameter in coupling.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(1, 1, 4, 4)
    board = torch.tensor([[1, 0], [0, 1]]).repeat(2, 2)
    mask = board if updates == 1 else 1 - board
    expected = coupling.net(x * mask)
    shift, raw_scale = coupling(_to_colors(x)[1 - updates]).chunk(2, 1)
    assert torch.equal(shift, _to_colors(expected[:, :1])[updates])
    assert torch.equal(raw_scale, _to_colors(expected[:, 1:])[updates])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Glow(image_shape=(1, 6, 8)), ValueError, r"`image_shape` \(=\(1, 6, 8\)\) must have sides .* of 8"),
        (lambda: RealNVP(image_shape=(1, 6, 8)), ValueError, r"`image_shape` .* use images of \(1, 8, 8\)"),
        (
            lambda: Glow(image_shape=(1, 4, 4), num_scales=3),
            ValueError,
            "of 8, since .* and `num_scales` is 3; use ima",
        ),
        (lambda: RealNVP(image_shape=SHAPE, alpha=0.5), ValueError, r"`alpha` \(=0.5\) must be a number between"),
        (lambda: Glow(image_shape=SHAPE, num_scales=0), ValueError, r"`num_scales` \(=0\)"),
        (lambda: Glow(image_shape=SHAPE, policy=1), TypeError, r"`policy` \(=1\) must be a policy"),
        (
            lambda: make(FLOWS["glow"])(images((1, 4, 4))),
            ValueError,
            r"`x` \(of shape \(3, 1, 4, 4\)\) must be \(B, 1, 8",
        ),
        (lambda: make(FLOWS["realnvp"]).inverse(torch.zeros(1, 3)), ValueError, r"`z` \(of shape \(1, 3\)\) must be"),
    ],
)
def test_rejects_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_models_share_their_interface():
    for name in ("log_prob", "bits_per_dim", "sample", "inpaint"):
        assert getattr(NICE, name) is getattr(Glow, name) is getattr(RealNVP, name)
