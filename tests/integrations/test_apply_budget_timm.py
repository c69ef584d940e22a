"""Budgets for models of timm, which are used as they are."""

import copy

import pytest
import torch

from revnet import Checkpoint, apply_budget
from revnet.memory import measure, predict
from revnet.nn import remove_policies


def _timm():
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # A torchvision for another device than PyTorch's raises the latter.
        pytest.skip(f"timm cannot be imported: {error}")
    return timm


def _gradients(model, images):
    model = copy.deepcopy(model)
    torch.manual_seed(1)
    model(images).square().sum().backward()
    return [*[parameter.grad for parameter in model.parameters()], *model.buffers()]


@pytest.mark.parametrize(
    ("name", "options", "size", "first"),
    [
        ("vit_tiny_patch16_224", {"depth": 4, "drop_path_rate": 0.2, "img_size": 96}, 96, "blocks.0"),
        ("resnet18", {}, 64, "layer1.0"),
    ],
)
def test_budget_is_met_to_the_byte(name, options, size, first):
    model = _timm().create_model(name, pretrained=False, num_classes=5, **options)
    images, keys = torch.randn(8, 3, size, size), list(model.state_dict())
    expected, plain = _gradients(model, images), predict(model, images)
    least = apply_budget(model, images, budget=plain.peak_bytes).points[0].peak_bytes
    chosen = apply_budget(model, images, budget=least)
    assert chosen.units[0].name == first
    assert Checkpoint() in {unit.policy for unit in chosen.units}
    assert chosen.memory == measure(model, images)
    assert chosen.peak_bytes < plain.peak_bytes
    assert list(model.state_dict()) == keys
    for actual, wanted in zip(_gradients(model, images), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_own_switch_must_be_off():
    model = _timm().create_model("vit_tiny_patch16_224", pretrained=False, depth=2, img_size=32)
    images = torch.randn(2, 3, 32, 32)
    model.set_grad_checkpointing()
    with pytest.raises(ValueError, match=r"`grad_checkpointing` .* `model\.set_grad_checkpointing\(False\)`"):
        apply_budget(model, images, budget="1GiB")
    model.set_grad_checkpointing(False)
    apply_budget(model, images, budget="1GiB")
    model.set_grad_checkpointing()
    assert predict(model, images) == measure(model, images)
    remove_policies(model)
