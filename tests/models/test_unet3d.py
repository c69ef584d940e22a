from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet import Checkpoint, Reverse, Store, set_policy
from revnet.memory import measure, plan, predict
from revnet.models import UNet3d
from revnet.nn._whole_model import policy_holders
from tests.helpers import assert_close, gradients, squares

TINY = {"in_channels": 2, "num_classes": 3, "widths": (4, 8, 12)}


def make(**options):
    return UNet3d(**{**TINY, **options})


def make_with_twin(**options):
    model, twin = make(**options).double(), make(policy=Store(), **options).double()
    twin.load_state_dict(model.state_dict())
    return model, twin


def make_input(size=(8, 8, 8), dtype=torch.float64):
    return torch.randn(2, 2, *size, dtype=dtype)


def test_default_is_the_published_network():
    with torch.device("meta"):
        model = UNet3d()
    widths = (60, 120, 240, 360, 480)
    residuals = sum(
        2 * 2 * (27 * (width // 2) ** 2 + 2 * (width // 2)) for width in widths
    )  # f and g, encoder and decoder
    between = sum(2 * a * b + a + b for a, b in pairwise(widths))
    ends = 27 * 4 * 60 + 60 * 3 + 3
    assert sum(parameter.numel() for parameter in model.parameters()) == residuals + between + ends == 12_365_283
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {30}
    assert model(torch.empty(1, 4, 16, 32, 48, device="meta")).shape == (1, 3, 16, 32, 48)


def by_hand(model, x):
    """Compute the published forward pass with explicit blocks."""

    def residual(function, x):
        return function.conv(F.leaky_relu(F.group_norm(x, function.norm.num_groups, *function.norm.parameters())))

    def blocks(sequence, x):
        x1, x2 = x.chunk(2, 1)
        for block in sequence:
            x1 = x1 + residual(block.f, x2)
            x2 = x2 + residual(block.g, x1)
        return torch.cat((x1, x2), 1)

    levels = range(len(model.encoder))
    y, skips = model.stem(x), []
    for level in levels:
        if level > 0:
            skips.append(y)
            y = model.downsamples[level - 1][1](F.max_pool3d(y, 2))
        y = blocks(model.encoder[level], y)
    for level in reversed(levels):
        y = blocks(model.decoder[level], y)
        if level > 0:
            y = model.upsamples[level - 1][0](y)
            y = F.interpolate(y, scale_factor=2, mode="trilinear", align_corners=False) + skips.pop()
    return model.head(y)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_output_equals_the_published_computation(num_blocks):
    model = make(num_blocks=num_blocks).double()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter)
    x = make_input()
    assert_close(model(x), by_hand(model, x), tolerance=1e-12)


@pytest.mark.parametrize("size", [(8, 8, 8), (4, 8, 12)])
@pytest.mark.parametrize("options", [{"num_blocks": 1}, {"num_blocks": 3, "num_decoder_blocks": 1}])
def test_step_equals_the_stored_twin(size, options):
    model, twin = make_with_twin(**options)
    x = make_input(size).requires_grad_()
    twin_x = x.detach().clone().requires_grad_()
    y, expected = model(x), twin(twin_x)
    assert torch.equal(y, expected)
    assert y.shape == (2, 3, *size)
    squares(y).backward()
    squares(expected).backward()
    assert_close(x.grad, twin_x.grad)
    assert_close(gradients(model), gradients(twin))
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_gradients_under_autocast_equal_the_twin():
    """The streams are float32, since rebuilding in bfloat16 would be inaccurate."""
    model = make(num_blocks=4)
    twin = make(num_blocks=4, policy=Store())
    twin.load_state_dict(model.state_dict())
    x = make_input(dtype=torch.float32)
    for module in (model, twin):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            module(x).float().logsumexp(1).sum().backward()
    for (name, gradient), expected in zip(gradients(model).items(), gradients(twin).values(), strict=True):
        assert (gradient - expected).norm() <= 0.01 * expected.norm() + 1e-6, name


def activation_bytes(num_blocks, policy):
    return predict(make(num_blocks=num_blocks, policy=policy), make_input(dtype=torch.float32)).activation_bytes


def test_memory_is_flat_in_the_number_of_blocks():
    """Memory is flat from two blocks on, where one pair of streams is rebuilt while another is stored."""
    one, two, four, eight = (activation_bytes(num_blocks, Reverse()) for num_blocks in (1, 2, 4, 8))
    pair = 2 * 4 * 8**3 * 4  # first level: batch, channels, voxels, bytes
    assert one + pair >= two == four == eight
    one, two, four, eight = (activation_bytes(num_blocks, Store()) for num_blocks in (1, 2, 4, 8))
    assert eight - four == 2 * (four - two) == 4 * (two - one) > 0


def test_memory_between_the_passes_is_flat_in_depth():
    held = {predict(make(num_blocks=num), make_input(dtype=torch.float32)).held_bytes for num in (1, 2, 8)}
    assert len(held) == 1


def test_prediction_equals_the_measurement():
    for policy in (Reverse(), Store()):
        model, x = make(num_blocks=2, policy=policy), make_input(dtype=torch.float32)
        assert predict(model, x) == measure(model, x)


def test_modules_between_levels_accept_a_checkpoint():
    model, twin = make_with_twin(num_blocks=2)
    set_policy(model.downsamples, Checkpoint())
    x = make_input()
    assert predict(model, x).held_bytes < predict(twin, x).held_bytes
    less = make(num_blocks=2).double()
    assert predict(model, x).held_bytes < predict(less, x).held_bytes
    for module in (model, twin):
        squares(module(x)).backward()
    assert_close(gradients(model), gradients(twin))


def test_a_plan_fits_the_budget():
    model, x = make(num_blocks=1, widths=(4, 8)), make_input((8, 8, 8), torch.float32)
    set_policy(model, Store())
    stored = predict(model, x).peak_bytes
    planned = plan(model, x, budget=int(0.9 * stored))
    planned.apply(model)
    assert predict(model, x).peak_bytes == planned.peak_bytes <= 0.9 * stored
    assert {policy for holder in policy_holders(model).values() for policy in holder.policies} != {Store()}


def balls(count, size, generator):
    """Return noisy volumes with a slightly brighter ball in each, and the masks of the balls."""
    axis = torch.arange(size)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    centers = torch.rand(count, 3, 1, 1, 1, generator=generator) * (size / 2) + size / 4
    radii = torch.rand(count, 1, 1, 1, generator=generator) * (size / 8) + size / 6
    masks = (grid - centers).square().sum(1).sqrt() < radii
    noise = torch.randn(count, size, size, size, generator=generator)
    return (masks + noise).unsqueeze(1), masks.unsqueeze(1)


def dice(predicted, masks):
    return (2 * (predicted & masks).sum() / (predicted.sum() + masks.sum())).item()


def test_learns_to_segment_balls():
    """Single voxels of the balls cannot be distinguished from the noise."""
    generator = torch.Generator().manual_seed(0)
    volumes, masks = balls(16, 16, generator)
    best_threshold = max(dice(volumes > threshold, masks) for threshold in torch.arange(0, 3, 0.1))
    model = UNet3d(in_channels=1, num_classes=1, widths=(8, 16, 32))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        x, y = balls(4, 16, generator)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(model(x), y.float()).backward()
        optimizer.step()
    with torch.no_grad():
        assert dice(model.eval()(volumes) > 0, masks) > 2 * best_threshold


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            (1, 2, 8, 8, 10),
            r"`x` \(of shape 1x2x8x8x10\) must have sides that are multiples of 4, since they are halved 2",
        ),
        ((1, 2, 9, 1, 8), r"times; pad the volume to 12x4x8 with `torch.nn.functional.pad`"),
        ((1, 2, 2, 2, 2), r"pad the volume to 4x4x4"),
        ((2, 8, 8, 8), r"`x` \(of shape 2x8x8x8\) must be \(B, 2, D, H, W\): .* for one volume pass `x\[None\]`"),
        ((1, 3, 8, 8, 8), r"`x` \(of shape 1x3x8x8x8\) must be \(B, 2, D, H, W\): a batch of volumes with 2 channels"),
    ],
)
def test_rejects_wrong_volumes(shape, message):
    with pytest.raises(ValueError, match=message):
        make()(torch.randn(shape))


def test_one_level_accepts_any_size():
    assert make(widths=(4,))(make_input((3, 5, 7), torch.float32)).shape == (2, 3, 3, 5, 7)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"widths": (4, 7)}, ValueError, r"`widths\[1\]` \(=7\) must be even, .*; use 8"),
        ({"widths": ()}, ValueError, r"`widths` \(=\(\)\) must have at least one level"),
        ({"widths": (4, 0)}, ValueError, r"`widths\[1\]` \(=0\) must be a positive integer"),
        ({"widths": 4}, TypeError, r"`widths` \(=4\) must be a sequence of integers"),
        ({"num_blocks": 0}, ValueError, r"`num_blocks` \(=0\) must be a positive integer"),
        ({"num_decoder_blocks": 0}, ValueError, r"`num_decoder_blocks` \(=0\) must be a positive integer"),
        ({"num_classes": 0}, ValueError, r"`num_classes` \(=0\) must be a positive integer"),
        ({"in_channels": 1.5}, ValueError, r"`in_channels` \(=1.5\) must be a positive integer"),
        ({"policy": "x"}, ValueError, r"`policy` \(='x'\) must be a policy: `Reverse\(\)`, `Checkpoint\(\)`"),
    ],
)
def test_rejects_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_model_takes_volumes_of_several_sizes():
    torch._dynamo.reset()
    model = UNet3d(in_channels=1, num_classes=2, widths=(4, 8)).double().eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for shape in ((2, 1, 8, 8, 8), (1, 1, 12, 8, 8), (2, 1, 8, 8, 8)):
        x = torch.randn(shape, dtype=torch.float64)
        assert_close(compiled(x), model(x))
    torch._dynamo.reset()
