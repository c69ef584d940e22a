import pytest
import torch
import torch.nn.functional as F
from torch import nn

from revnet import Checkpoint, Reverse, Store, create_model
from revnet.memory import count_flops, plan, predict
from revnet.models import ReversibleViT
from revnet.models.reversible_vit import Attention, DropPath, PatchEmbedding, PositionEmbedding
from tests.helpers import assert_close, gradients, squares

TINY = {"img_size": 16, "patch_size": 4, "dim": 8, "depth": 3, "num_heads": 2, "num_classes": 5}


def make(**options):
    return ReversibleViT(**{**TINY, **options})


def num_parameters_of(dim, depth, mlp_ratio, patch_size, num_patches, num_classes):
    """Return the number of parameters, computed only from the architecture."""
    patches = 3 * patch_size**2 * dim + dim
    attention = dim * 3 * dim + 3 * dim + dim * dim + dim
    perceptron = 2 * mlp_ratio * dim * dim + mlp_ratio * dim + dim
    block = 2 * dim + attention + 2 * dim + perceptron
    return patches + num_patches * dim + depth * block + 2 * (2 * dim) + 2 * dim * num_classes + num_classes


SIZES = {
    "revvit_small": (384, 12, 4, 16, 196, 1000),
    "revvit_base": (768, 12, 4, 16, 196, 1000),
    "revvit_cifar": (192, 9, 2, 4, 64, 10),
}


@pytest.mark.parametrize(
    ("name", "exact", "published_millions", "published_multiply_adds"),
    [
        # Mangalam et al. (2022), table 1, and PySlowFast's projects/rev
        ("revvit_small", 22_434_664, 22, 4.6e9),
        ("revvit_base", 87_335_656, 87, 17.6e9),
        ("revvit_cifar", 2_699_530, None, None),
    ],
)
def test_published_sizes(name, exact, published_millions, published_multiply_adds):
    with torch.device("meta"):
        model = create_model(name)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters == num_parameters_of(*SIZES[name]) == exact
    if published_millions is not None:
        assert round(num_parameters / 1e6) == published_millions
        flops = count_flops(model, torch.empty(1, 3, 224, 224, device="meta"))
        assert flops / 2 == pytest.approx(published_multiply_adds, rel=0.01)


def test_small_size_differs_from_a_vit_in_stem_and_head():
    """ViT-S/16 (timm's vit_small_patch16_224) has 22,050,664 parameters."""
    plain_head = 2 * 384 + 384 * 1000 + 1000  # layer norm and head on one stream
    head = 2 * 768 + 768 * 1000 + 1000
    class_token = 384 + 384  # and its position
    assert 22_434_664 - head == 22_050_664 - plain_head - class_token


def by_hand(model, x):
    """Compute the published network without the library's blocks."""
    p = dict(model.named_parameters())
    patch = p["stem.0.weight"].shape[-1]
    B, C, H, W = x.shape
    patches = x.reshape(B, C, H // patch, patch, W // patch, patch).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    tokens = patches @ p["stem.0.weight"].flatten(1).T + p["stem.0.bias"] + p["stem.1.weight"].flatten(2).mT
    D = tokens.shape[-1]

    def norm(x, name):
        centered = x - x.mean(-1, keepdim=True)
        x = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    a, b = tokens, tokens
    for index, block in enumerate(model.stages):
        name, num_heads = f"stages.blocks.{index}", block.f.num_heads
        q, k, v = linear(norm(b, f"{name}.f.norm"), f"{name}.f.qkv").chunk(3, -1)
        heads = []
        for head in range(num_heads):
            part = slice(head * D // num_heads, (head + 1) * D // num_heads)
            scores = q[..., part] @ k[..., part].mT / (D // num_heads) ** 0.5
            heads.append(scores.softmax(-1) @ v[..., part])
        a = a + linear(torch.cat(heads, -1), f"{name}.f.project")
        hidden = linear(norm(a, f"{name}.g.norm"), f"{name}.g.expand")
        hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
        b = b + linear(hidden, f"{name}.g.project")
    return linear(norm(torch.cat([a, b], -1), "norm").mean(1), "head")


def test_output_equals_the_published_computation():
    model = make().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)  # random, since swapped norms would be equal with ones and zeros
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert_close(model(x), by_hand(model, x), tolerance=1e-12)


def activation_bytes(depth, policy):
    return predict(make(depth=depth, policy=policy), torch.empty(2, 3, 16, 16)).activation_bytes


def test_memory_is_flat_in_depth():
    assert len({activation_bytes(depth, Reverse()) for depth in (1, 2, 4, 12, 24)}) == 1
    shallow, middle, deep = (activation_bytes(depth, Store()) for depth in (4, 8, 16))
    assert deep - middle == 2 * (middle - shallow) > 0


def test_memory_between_the_passes_is_two_streams():
    """The rest is mean and deviation per token for the norm, the pooled features for the head, and the loss."""
    num_tokens, width = 2 * 256, 2 * 8
    held = num_tokens * width + 2 * num_tokens + 2 * width + 1
    sample = 4096  # at most, for the check of the rebuilt streams
    for depth in (1, 12):
        memory = predict(make(img_size=64, depth=depth), torch.empty(2, 3, 64, 64))
        assert 0 <= memory.held_bytes - 4 * held <= sample < 4 * num_tokens * width / 2


def test_a_plan_fits_the_budget():
    model, images = make(depth=4), torch.empty(4, 3, 16, 16)
    model.stages.set_policies(Store())
    stored = predict(model, images).peak_bytes
    planned = plan(model, images, budget=int(0.6 * stored), optimizer=None)
    planned.apply(model)
    assert predict(model, images).peak_bytes == planned.peak_bytes <= 0.6 * stored
    assert len(planned.units) == 1 + 4, "the stem, and each block"


@pytest.mark.parametrize("size", [(8, 8), (16, 32), (20, 12)])
def test_interpolates_positions_for_other_sizes(size):
    model, twin = make().double(), make(policy=Store()).double()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    for module in (model, twin):
        squares(module(x)).backward()
    assert_close(gradients(model), gradients(twin))
    assert model.stem[1].weight.grad.any()
    assert model.forward_features(x).shape == (2, 16, size[0] // 4, size[1] // 4)


def test_interpolates_smooth_positions_smoothly():
    embedding = PositionEmbedding(1, 8)
    ramp = torch.linspace(0, 1, 8)
    with torch.no_grad():
        embedding.weight.copy_(ramp.expand(1, 1, 8, 8))
    y = embedding(torch.zeros(1, 1, 16, 16))
    steps = y[0, 0, 0, 2:-2].diff()  # it overshoots a little at the ends
    assert_close(steps, torch.full_like(steps, 1 / 14), tolerance=0.01)
    assert y.mean().item() == pytest.approx(0.5)


def test_tokens_see_all_tokens():
    attention = Attention(8, 2).double()
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    squares(attention(x)[0, 0, 0]).backward()
    assert (x.grad.abs().sum(-1) > 0).all()


def test_tokens_have_the_position_of_their_patch():
    """Each patch of an image changes the same position of the stem's map, which is not transposed."""
    model = make().eval()
    x = torch.randn(1, 3, 8, 16)
    before = model.stem(x)
    x[..., 4:8, 12:16] += 1
    changed = (model.stem(x) - before).abs().sum(1)[0] > 0
    assert changed.tolist() == [[False] * 4, [False] * 3 + [True]]


def test_streams_are_float32_under_autocast():
    model = make(depth=12, dim=32)
    twin = make(depth=12, dim=32, policy=Store())
    twin.load_state_dict(model.state_dict())
    dtypes = []
    model.stages.register_forward_hook(lambda module, inputs, y: dtypes.append(y.dtype))
    x = torch.randn(4, 3, 16, 16)
    for module in (model, twin):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            module(x).float().logsumexp(1).sum().backward()
    assert dtypes == [torch.float32]
    for (name, gradient), expected in zip(gradients(model).items(), gradients(twin).values(), strict=True):
        assert (gradient - expected).norm() <= 0.01 * expected.norm() + 1e-6, name


def test_drop_path_drops_samples_and_keeps_the_mean():
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(y.amin((1, 2)), y.amax((1, 2))), "whole samples"
    assert y.mean().item() == pytest.approx(1, abs=0.05)  # five standard errors of the mean are 0.046
    assert torch.equal(drop.eval()(x), x)
    assert repr(drop) == "DropPath(rate=0.25)"


def test_drop_path_rises_with_depth():
    model = make(drop_path=0.2)
    assert [block.f.drop_path.rate for block in model.stages] == pytest.approx([0, 0.1, 0.2])
    assert [block.g.drop_path.rate for block in model.stages] == pytest.approx([0, 0.1, 0.2])
    assert make(depth=1, drop_path=0.2).stages[0].f.drop_path.rate == 0


def test_initial_weights_follow_a_vit():
    model = make(dim=64)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            # Five standard errors of the estimate. The truncation at 100 deviations has no effect.
            tolerance = 5 / (2 * module.weight.numel()) ** 0.5
            assert module.weight.std().item() == pytest.approx(0.02, rel=tolerance)
            assert not module.bias.any()
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6
            assert torch.equal(module.weight, torch.ones_like(module.weight))
    assert model.stem[1].weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_stem_has_a_separate_policy():
    model, twin = make().double(), make().double()
    twin.load_state_dict(model.state_dict())
    twin.stem.set_policies(Checkpoint())
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for module in (model, twin):
        squares(module(x)).backward()
    assert_close(gradients(model), gradients(twin))


def test_learns_to_distinguish_patterns():
    """Horizontal and vertical stripes of any phase are equal to a network that ignores positions."""
    size, generator = 16, torch.Generator().manual_seed(0)

    def batch(count):
        labels = torch.randint(2, (count,), generator=generator)
        phase = 6.28 * torch.rand(count, 1, 1, 1, generator=generator)
        stripes = torch.sin(torch.arange(size).view(1, 1, -1, 1) * 0.8 + phase).expand(count, 3, size, size)
        images = torch.where(labels.view(-1, 1, 1, 1) == 1, stripes, stripes.mT)
        return images + 0.3 * torch.randn(count, 3, size, size, generator=generator), labels

    model = make(dim=16, num_classes=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        images, labels = batch(32)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    images, labels = batch(200)
    assert (model.eval()(images).argmax(1) == labels).float().mean() > 0.95


@pytest.mark.parametrize("size", [(18, 16), (16, 7), (3, 3)])
def test_rejects_images_that_are_not_multiples_of_the_patch(size):
    fitting = {(18, 16): "16x16", (16, 7): "16x8", (3, 3): "4x4"}[size]
    message = rf"images of {size[0]}x{size[1]} cannot be cut into patches of 4x4; resize or pad them, to {fitting} for"
    for model in (make(), make(policy=Store()), PatchEmbedding(3, 8, 4)):
        with pytest.raises(ValueError, match=message):
            model(torch.randn(1, 3, *size))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dim": 9},
            r"`dim` \(=9\) must be a multiple of `num_heads` \(=2\), since the heads share the features; pass 10, or",
        ),
        (
            {"img_size": 30},
            r"`img_size` \(=30\) must be a multiple of `patch_size` \(=4\); pass 32, or change `patch_size`",
        ),
        ({"img_size": 1}, r"`img_size` \(=1\) must be a multiple of `patch_size` \(=4\); pass 4, or"),
        ({"depth": 0}, r"`depth` \(=0\) must be a positive integer"),
        ({"patch_size": (4, 4)}, r"`patch_size` \(=\(4, 4\)\) must be a positive integer"),
        ({"num_heads": 0}, r"`num_heads` \(=0\) must be a positive integer"),
        ({"mlp_ratio": 0}, r"`mlp_ratio` \(=0\) must be a positive number; 4 is usual"),
        ({"dropout": 1}, r"`dropout` \(=1\) must be a number from 0 to below 1"),
        ({"drop_path": -0.1}, r"`drop_path` \(=-0.1\) must be a number from 0 to below 1"),
        ({"num_classes": -1}, r"`num_classes` \(=-1\) must be a positive integer, or 0"),
    ],
)
def test_rejects_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("policy", [3, Store, [Reverse()]])
def test_rejects_wrong_policies(policy):
    with pytest.raises(
        TypeError, match=r"`policy` \(=.*\) must be a policy: `Reverse\(\)`, `Checkpoint\(\)`, .*`Store\(\)`"
    ):
        make(policy=policy)
