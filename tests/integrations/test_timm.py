"""The classifiers in timm's own functions."""

import copy

import pytest
import torch
from torch import nn

import revnet
from revnet import Store
from revnet.models._image_classifier import AbstractImageClassifier

timm = pytest.importorskip("timm", reason="timm is not installed")

for part in ("data", "loss", "models", "models._features", "optim", "utils"):
    pytest.importorskip(f"timm.{part}")
names_before = set(timm.list_models())
pytest.importorskip("revnet.timm")

NAMES = [revnet.timm.timm_name(name) for name in revnet.list_models()]
SMALL = ["revnet38", "revnet_resnet32", "irevnet_cifar", "revvit_cifar"]
"""A model of each family."""
all_families = pytest.mark.parametrize("name", SMALL)


def own_name(name):
    return name.removeprefix("revnet_")


def images(batch_size=2, channels=3, side=32):
    return torch.randn(batch_size, channels, side, side)


def rates(model, layer_decay=0.5):
    """Return the factor of the learning rate of each parameter, by name."""
    groups = timm.optim.param_groups_layer_decay(model, layer_decay=layer_decay, min_scale=0.0)
    of_parameter = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    return {name: of_parameter[id(parameter)] for name, parameter in model.named_parameters()}


def test_names_are_new_to_timm():
    assert not names_before & set(NAMES)
    assert set(NAMES) <= set(timm.list_models())
    assert revnet.timm.register_models() == []


@pytest.mark.parametrize("name", NAMES)
def test_every_classifier_is_created_with_its_configuration(name):
    model = timm.create_model(name, device="meta")
    expected = revnet.create_model(own_name(name)) if name in SMALL else None
    assert isinstance(model, AbstractImageClassifier)
    cfg = model.pretrained_cfg
    assert cfg is model.default_cfg
    assert cfg["url"] == ""
    assert cfg["num_classes"] == model.num_classes == model.get_submodule(cfg["classifier"]).out_features
    size = revnet.models.published_image_size(own_name(name))
    assert cfg["input_size"] == (3, size, size)
    assert len(cfg["mean"]) == len(cfg["std"]) == 3
    if cfg["first_conv"] is not None:
        assert model.get_submodule(cfg["first_conv"]).in_channels == 3
    assert not timm.models.is_model_pretrained(name)
    if expected is not None:
        assert list(model.state_dict()) == list(expected.state_dict())


@all_families
def test_a_model_equals_the_one_of_this_library(name):
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=7, in_chans=1).eval()
    torch.manual_seed(3)
    expected = revnet.create_model(own_name(name), num_classes=7, in_channels=1).eval()
    x = images(channels=1)
    assert torch.equal(model(x), expected(x))
    assert (model.in_chans, model.num_classes, model.num_features) == (1, 7, expected.num_features)
    assert model.head_hidden_size == model.num_features


@all_families
def test_pretrained_weights_are_refused_in_one_line(name):
    with pytest.raises(ValueError, match=rf"`pretrained` \(=True\) must be False, since no weights of {name}"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", [name for name in SMALL if name != "irevnet_cifar"])
def test_own_weights_are_loaded_and_fitted(name, tmp_path):
    model = timm.create_model(name)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    same = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=1)
    checkpoint = timm.create_model(name, checkpoint_path=overlay["file"])
    for key, value in model.state_dict().items():
        assert torch.equal(same.state_dict()[key], value)
        assert torch.equal(checkpoint.state_dict()[key], value)
        if key == "stem.0.weight":  # timm sums the weights of the colors
            assert torch.allclose(other.state_dict()[key], value.sum(1, keepdim=True))
        elif not key.startswith("head."):
            assert torch.equal(other.state_dict()[key], value)
    assert other(images(channels=1)).shape == (2, 4)


@all_families
def test_a_folder_for_the_hub_loads_again(name, tmp_path):
    options = {} if name == "revnet_resnet32" else {"policy": "store"}
    model = timm.create_model(name, num_classes=3, in_chans=1, **options).eval()
    timm.models.save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = images(channels=1)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"drop_path_rate": 0.1}, TypeError, r"`drop_path_rate` \(=0.1\) is not an option of revnet38; pass 0"),
        ({"drop_rate": 1.0}, ValueError, r"`drop_rate` \(=1.0\) must be a number from 0 to below 1"),
        ({"img_size": 64}, TypeError, r"`img_size` \(=64\) is not an option of revnet38; pass no size"),
        ({"depth": 3}, TypeError, r"`depth` \(=3\) is not an option of revnet38; pass only what it takes: `policy`"),
        ({"global_pool": "catavgmax"}, ValueError, r"`global_pool` \(='catavgmax'\)"),
        ({"global_pool": ""}, ValueError, r"`global_pool` \(=''\) needs `num_classes=0`"),
        ({"policy": "rev"}, ValueError, r"`policy` \(='rev'\)"),
        ({"in_chans": 0}, ValueError, "`in_channels`"),
        ({"num_classes": -1}, ValueError, "`num_classes`"),
        ({"features_only": True, "feature_cls": "list"}, ValueError, r"`feature_cls` \(='list'\) must be 'getter' or"),
        ({"features_only": True, "feature_cls": "fx"}, ValueError, "`feature_cls`"),
    ],
)
def test_rejects_options_that_a_model_does_not_have(options, error, message):
    with pytest.raises(error, match=message):
        timm.create_model("revnet38", **options)


def test_options_of_the_transformer():
    model = timm.create_model("revvit_cifar", img_size=(16, 16), drop_path_rate=0.2, policy="store")
    assert model.stem[1].weight.shape[-2:] == (4, 4)
    assert [block.f.drop_path.rate for block in model.stages][-1] == 0.2
    assert set(model.stages.policies) == {Store()}
    with pytest.raises(ValueError, match=r"`img_size` \(=\(16, 32\)\) must be the side of square images"):
        timm.create_model("revvit_cifar", img_size=(16, 32))


def test_defaults_that_scripts_pass_are_accepted():
    model = timm.create_model("revnet38", drop_rate=0.0, drop_path_rate=0.0, global_pool="avg", scriptable=False)
    assert model.drop_rate == 0


@all_families
def test_pooling_and_dropout(name):
    model = timm.create_model(name, num_classes=0, global_pool="").eval()
    x = images()
    features = model.forward_features(x)
    assert torch.equal(model(x), features)
    model.reset_classifier(5, "max")
    assert torch.equal(model.forward_head(features, pre_logits=True), features.amax((2, 3)))
    model.reset_classifier(0, "avg")
    model.drop_rate = 0.5
    assert torch.equal(model(x), features.mean((2, 3))), "not in evaluation mode"
    model.train()
    torch.manual_seed(0)
    dropped = model.forward_head(features)
    torch.manual_seed(0)
    assert torch.equal(dropped, nn.functional.dropout(features.mean((2, 3)), 0.5))


# Parameters by depth ----------------------------------------------------------------------------------------------


@all_families
def test_layer_decay_lowers_the_rate_with_the_depth(name):
    model = timm.create_model(name)
    scale = rates(model)
    stem = [rate for key, rate in scale.items() if key.startswith("stem.")]
    blocks = [rate for key, rate in scale.items() if key.startswith("stages.")]
    assert scale["head.weight"] == 1
    assert scale["norm.weight"] == max(blocks) == 0.5
    assert blocks == sorted(blocks), "parameters are registered in the order in which they run"
    assert all(rate < min(blocks) for rate in stem)
    num_blocks = len(set(blocks))
    assert sorted(set(blocks)) == [0.5**power for power in range(num_blocks, 0, -1)]
    expected = {"revnet38": 9, "revnet_resnet32": 15, "irevnet_cifar": 18, "revvit_cifar": 9}
    assert num_blocks == expected[name]


@all_families
def test_coarse_groups_are_stages(name):
    model = timm.create_model(name)
    groups = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    num_stages = len(model.stages)
    has_stem = any(key.startswith("stem.") for key, _ in model.named_parameters())
    assert len(groups) == num_stages + 1 + has_stem  # and the head
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_position_embedding_is_not_decayed():
    model = timm.create_model("revvit_cifar")
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.75)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert groups[id(model.stem[1].weight)]["weight_decay"] == 0
    assert groups[id(model.head.weight)]["weight_decay"] == 0.1
    assert groups[id(model.head.weight)]["lr_scale"] > groups[id(model.stages[0].f.qkv.weight)]["lr_scale"]


# Feature maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_feature_info_of_every_classifier(name):
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True, out_indices=(1, 2))
    assert isinstance(model, timm.models._features.FeatureGetterNet)
    whole = timm.create_model(name, device="meta")
    assert model.feature_info.channels() == [info["num_chs"] for info in whole.feature_info[1:3]]
    assert model.feature_info.reduction() == [info["reduction"] for info in whole.feature_info[1:3]]


@all_families
@pytest.mark.parametrize("feature_cls", ["getter", "hook"])
@pytest.mark.parametrize("out_indices", [None, (0, 2), (-1,), 2])
def test_features_are_the_whole_maps(name, feature_cls, out_indices):
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True, feature_cls=feature_cls, out_indices=out_indices).eval()
    torch.manual_seed(0)
    whole = timm.create_model(name).eval()
    if out_indices is None:
        chosen = list(range(len(whole.feature_info))) if name != "revvit_cifar" else [-3, -2, -1]
    else:
        chosen = [-2, -1] if out_indices == 2 else list(out_indices)
    x = images()
    maps, expected = model(x), whole.forward_intermediates(x, intermediates_only=True)
    assert len(maps) == len(chosen) == len(model.feature_info.channels())
    for map_, index, channels, reduction in zip(
        maps, chosen, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert torch.equal(map_, expected[index])
        assert map_.shape == (2, channels, 32 // reduction, 32 // reduction)


@all_families
def test_wrapped_models_train_like_the_twin(name):
    """The loss reads the maps that hooks have seen."""
    torch.manual_seed(0)
    model = timm.models.FeatureHookNet(timm.create_model(name).double(), out_indices=(0, 1, 2))
    twin = copy.deepcopy(
        timm.create_model(name, policy="store") if name != "revnet_resnet32" else timm.create_model(name)
    )
    twin.reset_classifier(0)
    twin.double().load_state_dict(model.body.state_dict())
    x = images().double()
    sum((map_.sin().square().sum() for map_ in model(x)), start=torch.zeros((), dtype=x.dtype)).backward()
    maps = twin.forward_intermediates(x, [0, 1, 2], intermediates_only=True)
    sum((map_.sin().square().sum() for map_ in maps), start=torch.zeros((), dtype=x.dtype)).backward()
    for parameter, expected in zip(model.body.parameters(), twin.parameters(), strict=True):
        assert (parameter.grad is None) == (expected.grad is None)
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, expected.grad, rtol=1e-8, atol=1e-10)


def test_a_hook_must_not_replace_a_map():
    model = timm.create_model("revnet38")
    model.maps[0].register_forward_hook(lambda module, inputs, y: y + 1)
    with pytest.raises(RuntimeError, match="a hook of a `FeatureMap` replaced the map"):
        model(images())


@all_families
def test_pruning_removes_later_stages(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    whole = copy.deepcopy(model)
    x = images()
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert len(model.stages) == 1
    maps = model.forward_intermediates(x, [0, 1], intermediates_only=True)
    expected = whole.forward_intermediates(x, [0, 1], intermediates_only=True)
    assert all(map(torch.equal, maps, expected))
    assert model(x).shape[:2] == (2, model.num_features)
    assert set(model.state_dict()) < set(whole.state_dict())
    model.prune_intermediate_layers([0])
    assert model(x).shape[1] == model.num_features


# Training ---------------------------------------------------------------------------------------------------------


@all_families
def test_checkpointing_switch(name):
    model = timm.create_model(name)
    model.set_grad_checkpointing(True)
    assert model.grad_checkpointing
    model.set_grad_checkpointing(False)
    assert not model.grad_checkpointing
    assert set(model.stem.policies) == {Store()}


@all_families
def test_a_training_step_with_the_tools_of_timm(name, tmp_path):
    """Reversed and stored models take the same step: Mixup, soft targets, clipping by AGC, EMA, checkpoints."""
    results = []
    for enable in (True, False):
        torch.manual_seed(0)
        timm.utils.random_seed(0)
        model = timm.create_model(name, num_classes=4).double()
        model.set_grad_checkpointing(enable)
        optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.01, momentum=0.9, layer_decay=0.7)
        ema = timm.utils.ModelEmaV3(model, decay=0.5)
        ema2 = timm.utils.ModelEmaV2(model, decay=0.5)
        mixup = timm.data.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=4)
        loss_function = timm.loss.SoftTargetCrossEntropy()
        losses = []
        for _ in range(2):
            x, targets = mixup(images(4).double(), torch.arange(4))
            loss = loss_function(model(x), targets.double())
            optimizer.zero_grad()
            loss.backward()
            timm.utils.dispatch_clip_grad(timm.models.model_parameters(model), 0.01, mode="agc")
            optimizer.step()
            ema.update(model)
            ema2.update(model)
            losses.append(loss.item())
        saver = timm.utils.CheckpointSaver(
            model, optimizer, model_ema=ema, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
        )
        saver.save_checkpoint(0, metric=1.0)
        resumed = timm.create_model(name, num_classes=4).double()
        timm.models.resume_checkpoint(resumed, str(tmp_path / "last.pth.tar"), optimizer)
        averaged = timm.create_model(name, num_classes=4).double()
        timm.models.load_checkpoint(averaged, str(tmp_path / "last.pth.tar"), use_ema=True)
        for copied, original in ((resumed, model), (averaged, ema.module)):
            for key, value in original.state_dict().items():
                assert torch.equal(copied.state_dict()[key], value)
        for value, expected in zip(ema2.module.parameters(), ema.module.parameters(), strict=True):
            assert torch.allclose(value, expected)
        results.append((losses, list(model.parameters())))
    (losses, weights), (twin_losses, twin_weights) = results
    assert losses == pytest.approx(twin_losses, rel=1e-9)
    for weight, expected in zip(weights, twin_weights, strict=True):
        assert torch.allclose(weight, expected, rtol=1e-8, atol=1e-10)


@all_families
def test_data_configuration(name):
    model = timm.create_model(name)
    config = timm.data.resolve_data_config(model=model)
    assert config["input_size"] == (3, 32, 32)
    assert config["mean"] == model.pretrained_cfg["mean"]
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 32, 32)


@all_families
def test_frozen_parts_get_no_gradient_and_keep_their_statistics(name):
    model = timm.create_model(name, policy="reverse") if name != "revnet_resnet32" else timm.create_model(name)
    model(images())  # so that the running statistics are not the initial ones
    expected = model.eval()(images())
    timm.utils.freeze(model, ["stem", "stages", "norm"])
    torch.manual_seed(0)
    x = images()
    model.eval()
    y = model(x)
    model.train()
    assert torch.allclose(model(x), y, rtol=1e-4, atol=1e-5) or name == "revvit_cifar"
    model(x).sum().backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is not None] == [
        "head.weight",
        "head.bias",
    ]
    timm.utils.unfreeze(model, ["stem", "stages", "norm"])
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert expected.shape == y.shape
