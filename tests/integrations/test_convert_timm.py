"""Models of timm and torchvision, converted in place."""

import copy

import pytest
import torch

import revnet
from revnet.conversion import BDIA, Consistent, Dr2Net, Rewire
from revnet.memory import measure, predict

LAYERS = ["layer1", "layer2", "layer3", "layer4"]
BRANCHES = ["norm1 attn ls1 drop_path1", "norm2 mlp ls2 drop_path2"]


def _create(name, **options):
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # A torchvision for another device than PyTorch's raises the latter.
        pytest.skip(f"timm cannot be imported: {error}")
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options)


def _vit(**options):
    return _create("vit_tiny_patch16_224", depth=4, img_size=32, patch_size=8, drop_path_rate=0.2, **options)


def _step(model, images):
    """Return the output, all gradients and all buffers after a step."""
    model.zero_grad()
    torch.manual_seed(1)
    y = model(images)
    y.square().sum().backward()
    return [y.detach(), *[parameter.grad for parameter in model.parameters()], *map(torch.clone, model.buffers())]


def _twins(model, method, **options):
    converted = copy.deepcopy(model)
    report = revnet.convert(converted, method, **options)
    stored = copy.deepcopy(converted)
    revnet.set_policy(stored, "store")
    return converted, stored, report


@pytest.mark.parametrize("branches", [None, BRANCHES])
def test_vision_transformer(branches):
    model, images = _vit(proj_drop_rate=0.1), torch.randn(2, 3, 32, 32)
    converted, _, report = _twins(model, Dr2Net(), blocks="blocks", branches=branches)
    assert report.converted == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    assert all(map(torch.equal, _step(converted, images), _step(model, images)))
    for method in (Consistent(), BDIA()):
        converted, stored, _ = _twins(model, method, blocks="blocks", branches=branches)
        assert all(map(torch.equal, _step(converted, images), _step(stored, images)))
        assert predict(converted, images) == measure(converted, images)
    distance = (converted.eval()(images) - model.eval()(images)).norm() / model(images).norm()
    assert distance < 1e-3  # BDIA rounds to a grid of 2^-14, and is the original network otherwise.


def test_residual_network_keeps_its_first_blocks():
    model, images = _create("resnet26", zero_init_last=False), torch.randn(2, 3, 32, 32)
    converted, _, report = _twins(model, Dr2Net(), blocks=LAYERS)
    assert report.converted == tuple(f"{layer}.1" for layer in LAYERS)
    assert list(report.left) == [f"{layer}.0" for layer in LAYERS]
    assert all(map(torch.equal, _step(converted, images), _step(model, images)))
    converted, stored, _ = _twins(model, Rewire(11), blocks=LAYERS)
    assert all(map(torch.equal, _step(converted, images), _step(stored, images)))


def test_torchvision_residual_network():
    torchvision = pytest.importorskip("torchvision", exc_type=(ImportError, RuntimeError))
    torch.manual_seed(0)
    model, images = torchvision.models.resnet18(), torch.randn(2, 3, 32, 32)
    converted, stored, report = _twins(model, Consistent(fraction_bits=11), blocks=LAYERS)
    assert "layer1.0" in report.converted
    assert list(report.left) == ["layer2.0", "layer3.0", "layer4.0"]
    assert all(map(torch.equal, _step(converted, images), _step(stored, images)))


def test_intermediate_features_equal_the_stored_twin():
    converted, stored, _ = _twins(_vit(), Consistent(0.5), blocks="blocks")
    images = torch.randn(2, 3, 32, 32)
    outcomes = []
    for model in (converted, stored):
        model.zero_grad()
        torch.manual_seed(1)
        features = model.forward_intermediates(images, indices=[0, 2], stop_early=True, intermediates_only=True)
        sum(feature.square().sum() for feature in features).backward()
        outcomes.append([*features, *[block.attn.qkv.weight.grad for block in model.blocks[:3]]])
    assert all(map(torch.equal, *outcomes))
    assert converted.blocks[3].attn.qkv.weight.grad is None
    for model in (converted, stored):
        model.prune_intermediate_layers([2])
    assert len(converted.blocks) == 3
    assert all(map(torch.equal, _step(converted, images), _step(stored, images)))


def test_bytes_do_not_grow_with_depth():
    images = torch.randn(4, 3, 32, 32)

    def activation_bytes(depth):
        model = _create("vit_tiny_patch16_224", depth=depth, img_size=32, patch_size=8, embed_dim=48, num_heads=3)
        revnet.convert(model, Consistent(1), blocks="blocks")
        return measure(model, images).activation_bytes

    assert activation_bytes(3) == activation_bytes(6)


def test_own_checkpointing_must_be_off():
    model = _vit()
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match=r"`model` \(=VisionTransformer\) has `grad_checkpointing` on"):
        revnet.convert(model, Rewire(), blocks="blocks")
