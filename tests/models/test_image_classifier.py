"""The timm interface of every family of networks."""

import math
import re

import pytest
import torch
from torch import nn

from revnet import Store
from revnet.memory import measure
from revnet.models import Highway, IRevNet, ResNet, ReversibleViT, RevNet
from tests.helpers import assert_close, assert_same_buffers, gradients, squares

OPTIONS = {"num_blocks": (1, 2), "widths": (4, 4, 8)}
VIT_OPTIONS = {"img_size": 32, "patch_size": 8, "dim": 8, "num_heads": 2}
all_networks = pytest.mark.parametrize(
    "make",
    [
        lambda **options: ResNet(**OPTIONS, **options),
        lambda **options: ResNet(**OPTIONS, block="bottleneck", stem="large", **options),
        lambda **options: RevNet(**OPTIONS, **options),
        lambda **options: RevNet(**OPTIONS, block="bottleneck", stem="large", **options),
        lambda **options: Highway(num_layers=(1, 2), width=8, **options),
        lambda **options: IRevNet(num_blocks=(1, 2), strides=(1, 2), **options),
        lambda **options: ReversibleViT(**VIT_OPTIONS, depth=2, **options),
    ],
    ids=["resnet", "resnet-large", "revnet", "revnet-large", "highway", "irevnet", "vit"],
)


def make_input(size=32):
    return torch.randn(2, 3, size, size)


@all_networks
def test_forward_is_features_then_head(make):
    model = make(num_classes=5).eval()
    x = make_input()
    features = model.forward_features(x)
    assert features.shape[:2] == (2, model.num_features)
    if isinstance(model, ReversibleViT):
        assert_close(features.var(1, correction=0), torch.ones(2, 4, 4), tolerance=1e-2)  # after the last layer norm
    elif isinstance(model, Highway):
        assert features.min() >= 0, "a mean of outputs of ReLU"
    else:
        assert features.min() == 0, "after the last ReLU"
    assert torch.equal(model.forward_head(features), model(x))
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(pooled, features.mean((2, 3)))
    assert torch.equal(model.head(pooled), model(x))


@all_networks
def test_zero_classes_return_pooled_features(make):
    model = make(num_classes=0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model.num_classes == 0
    y = model(make_input())
    assert y.shape == (2, model.num_features)
    squares(y).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@all_networks
def test_reset_classifier(make):
    model = make(num_classes=5)
    assert model.get_classifier() is model.head
    model.reset_classifier(1000)
    assert model.num_classes == 1000
    weight = model.get_classifier().weight
    if isinstance(model, ReversibleViT):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    else:
        bound = math.sqrt(3 / model.num_features)
        assert 0.99 * bound < weight.abs().max() <= bound
    assert torch.equal(model.head.bias, torch.zeros(1000))
    assert model(make_input()).shape == (2, 1000)
    model.reset_classifier(0)
    assert model(make_input()).shape == (2, model.num_features)
    model.reset_classifier(3)
    assert model(make_input()).shape == (2, 3)


@pytest.mark.parametrize("old", [5, 0])
def test_reset_classifier_keeps_device_and_dtype(old):
    model = RevNet(**OPTIONS, num_classes=old).to(torch.bfloat16).eval()
    model.reset_classifier(3)
    assert (model.head.weight.dtype, model.head.training) == (torch.bfloat16, False)
    with torch.device("meta"):
        model = RevNet(**OPTIONS, num_classes=old)
    model.reset_classifier(3)
    assert model.head.weight.device.type == "meta"


@pytest.mark.parametrize("num_classes", [-1, 2.0, None, True])
def test_reset_classifier_rejects_wrong_counts(num_classes):
    model = ResNet(**OPTIONS)
    head = model.head
    with pytest.raises(ValueError, match=r"`num_classes` \(=.*\) must be a positive integer, or 0 for pooled"):
        model.reset_classifier(num_classes)
    assert model.head is head


@all_networks
def test_feature_info_describes_the_maps(make):
    model = make()
    stem = "stem.2" if len(model.stem) > 3 else "stem"  # before the pooling
    stages = "maps" if model.is_reversible else "stages"
    assert [info["module"] for info in model.feature_info] == [stem, f"{stages}.0", f"{stages}.1"]
    x = make_input()
    _, maps = model.forward_intermediates(x)
    assert len(maps) == len(model.feature_info)
    for map_, info in zip(maps, model.feature_info, strict=True):
        side = 32 // info["reduction"]
        assert map_.shape == (2, info["num_chs"], side, side)
        assert isinstance(model.get_submodule(info["module"]), nn.Module)


@pytest.mark.parametrize(("stem", "reductions"), [("small", [1, 1, 2, 4, 8]), ("large", [2, 4, 8, 16, 32])])
@pytest.mark.parametrize("network", [ResNet, RevNet])
def test_reductions(network, stem, reductions):
    for block, expansion in (("basic", 1), ("bottleneck", 4)):
        model = network(num_blocks=(1,) * 4, widths=(4, 4, 6, 8, 10), stem=stem, block=block)
        assert [info["reduction"] for info in model.feature_info] == reductions
        assert [info["num_chs"] for info in model.feature_info] == [4, *(expansion * w for w in (4, 6, 8, 10))]
        assert model.num_features == 10 * expansion


@all_networks
def test_maps_equal_the_outputs_of_modules(make):
    model = make().eval()
    seen = []
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(lambda module, inputs, y: seen.append(y))
    x = make_input()
    features, maps = model.forward_intermediates(x)
    for map_, y in zip(maps, seen, strict=True):
        assert torch.equal(map_, y)
    seen.clear()
    assert torch.equal(model.forward_features(x), features)
    for map_, y in zip(maps, seen, strict=True):
        assert torch.equal(map_, y)
    assert torch.equal(features, model.forward_features(x))
    assert torch.equal(features, model._finish(maps[-1]))


@pytest.mark.parametrize("network", [RevNet, IRevNet, ReversibleViT])
def test_hooks_of_maps(network):
    options = {RevNet: OPTIONS, IRevNet: {"num_blocks": (1, 2), "strides": (1, 2)}}.get(
        network, {**VIT_OPTIONS, "depth": 2}
    )
    model = network(**options)
    x, seen = make_input(), []
    expected = model.eval()(x)
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
    forward = model.maps[0].register_forward_hook(lambda module, inputs, y: seen.append(y))
    backward = model.maps[1].register_full_backward_hook(lambda module, grads, of_output: seen.append(of_output[0]))
    assert torch.equal(model(x), expected), "the hook changes nothing"
    assert torch.equal(seen.pop(), maps[1])
    squares(model.forward_intermediates(x, [2], intermediates_only=True)[0]).backward()
    assert [tensor.shape for tensor in seen] == [maps[1].shape, maps[2].shape]
    forward.remove()
    backward.remove()
    model(x)
    assert len(seen) == 2
    model.maps[0].register_forward_hook(lambda module, inputs, y: y + 1)
    with pytest.raises(RuntimeError, match="a hook of a `FeatureMap` replaced the map"):
        model(x)


@all_networks
def test_pooling_before_the_head(make):
    model = make(num_classes=5).eval()
    x = make_input()
    features = model.forward_features(x)
    model.reset_classifier(3, "max")
    assert torch.equal(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    model.reset_classifier(0, "")
    assert torch.equal(model(x), features)
    assert model.get_classifier(name_only=True) == "head"
    with pytest.raises(ValueError, match=r"`global_pool` \(=''\) needs `num_classes=0` \(not 3\)"):
        model.reset_classifier(3)
    with pytest.raises(ValueError, match=r"`global_pool` \(='mean'\)"):
        model.reset_classifier(3, "mean")


@all_networks
def test_every_parameter_belongs_to_a_group(make):
    """Parameters of the head match no pattern, and timm gives them the highest rate."""
    model = make()
    for coarse in (False, True):
        matcher = model.group_matcher(coarse)
        patterns = [matcher["stem"], *(pattern for pattern, _ in matcher["blocks"])]
        left = [name for name, _ in model.named_parameters() if not any(re.match(p, name) for p in patterns)]
        assert left == ["head.weight", "head.bias"]
    assert model.no_weight_decay() <= dict(model.named_parameters()).keys()


@all_networks
def test_selection_of_maps(make):
    model = make().eval()
    x = make_input()
    features, maps = model.forward_intermediates(x)

    def chosen(indices, **options):
        taken = model.forward_intermediates(x, indices, intermediates_only=True, **options)
        return [next(i for i, map_ in enumerate(maps) if torch.equal(map_, feature_map)) for feature_map in taken]

    assert chosen(None) == [0, 1, 2]
    assert chosen(1) == [2]
    assert chosen(2) == [1, 2]
    assert chosen([0]) == [0]
    assert chosen((-1, 0)) == [0, 2], "in the network's order"
    assert chosen([1, 1, -2]) == [1]
    for stop_early in (False, True):
        assert chosen([0, 1], stop_early=stop_early) == [0, 1]
    normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
    assert torch.equal(normed[-1], features)
    assert torch.equal(normed[0], maps[0])
    assert torch.equal(normed[1], maps[1])


@all_networks
def test_stop_early_skips_later_stages(make):
    model = make().eval()
    x = make_input()
    maps = model.forward_intermediates(x, intermediates_only=True)
    ran = []
    for stage in model.stages:
        stage.register_forward_hook(lambda module, inputs, y: ran.append(module))
    model.norm.register_forward_hook(lambda module, inputs, y: ran.append(module))
    for indices, count in (([0], 0), ([1], 1), ([2, 0], 3)):
        ran.clear()
        last, _ = model.forward_intermediates(x, indices, stop_early=True)
        assert len(ran) == count
        assert torch.equal(last, maps[count] if count < 2 else model.forward_features(x))


@all_networks
@pytest.mark.parametrize("indices", [0, 4, -1, [3], [-4], [], [1.0], "stem"])
def test_rejects_missing_maps(make, indices):
    with pytest.raises(ValueError, match=r"`indices` \(=.*\) must (be from 1 to 3|name one or more of the 3 feature)"):
        make().forward_intermediates(make_input(), indices)


def test_rejects_another_layout():
    with pytest.raises(ValueError, match=r"`output_fmt` \(='NLC'\) must be 'NCHW'"):
        ResNet(**OPTIONS).forward_intermediates(make_input(), output_fmt="NLC")


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: RevNet(**OPTIONS, stem="large", **options),
        lambda **options: RevNet(**OPTIONS, block="bottleneck", stem="large", **options),
        lambda **options: IRevNet(num_blocks=(3, 3), strides=(1, 2), **options),
        lambda **options: ReversibleViT(**VIT_OPTIONS, depth=3, **options),
    ],
    ids=["basic", "bottleneck", "irevnet", "vit"],
)
@pytest.mark.parametrize("options", [{}, {"indices": [1]}, {"indices": [0, 1], "stop_early": True}, {"norm": True}])
def test_gradients_through_maps_equal_the_twin(make, options):
    """The loss reads the final features and all maps."""
    model, twin = make().double(), make(policy=Store()).double()
    twin.load_state_dict(model.state_dict())
    x = make_input().double().requires_grad_()
    twin_x = x.detach().clone().requires_grad_()
    for module, images in ((model, x), (twin, twin_x)):
        features, maps = module.forward_intermediates(images, **options)
        (squares(features) + sum((index + 2) * squares(torch.sin(map_)) for index, map_ in enumerate(maps))).backward()
    assert x.grad.any()
    assert_close(x.grad, twin_x.grad)
    assert_close(gradients(model), gradients(twin))
    assert_same_buffers(model, twin)


class Maps(nn.Module):
    """A module that returns the maps of a model, for `measure`."""

    def __init__(self, model, indices):
        super().__init__()
        self.model = model
        self.indices = indices

    def forward(self, x):
        return self.model.forward_intermediates(x, self.indices, intermediates_only=True)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_memory_with_maps_is_flat_in_depth(block):
    def peak(num_blocks, indices):
        model = RevNet(num_blocks=num_blocks, widths=(8, 8, 16), block=block)
        return measure(Maps(model, indices), make_input(16)).activation_bytes

    assert peak((4, 4), None) == peak((9, 9), None)
    assert peak((4, 4), [2]) < peak((4, 4), None), "maps that are not requested are not computed"


def test_transformer_stores_only_the_maps():
    """The blocks between two maps run as one sequence."""

    def peak(depth, indices):
        model = ReversibleViT(**VIT_OPTIONS, depth=depth)
        return measure(Maps(model, indices), make_input()).activation_bytes

    assert peak(4, [2, 4]) == peak(9, [2, 9])
    assert peak(4, [4]) < peak(4, [2, 4]) < peak(4, None)
