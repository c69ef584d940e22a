import copy
import inspect
import json

import pytest
import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from safetensors.torch import load_file, save_file
from torch import nn

import revnet
from revnet import Checkpoint, CheckpointError, FixedPoint, Offload, Reverse, Store, convert, create_model, set_coupling
from revnet.coupling import BDIA, ExactScaled, Scaled
from revnet.models import NICE, Glow, RealNVP, ResNet, ReversibleTransformer, RevNet, UNet3d, from_pretrained
from revnet.models.pretrained.hub_files import Download
from revnet.models.pretrained.mixin import HubMixin
from revnet.nn import BatchNorm2dBiased, set_policy, set_tolerance
from revnet.nn._whole_model import policy_holders
from tests.helpers import REVERSIBLE_MODELS, model_input


def tiny(**options):
    return RevNet(**{"num_blocks": (2, 1), "widths": (4, 4, 8), "num_classes": 3} | options)


def assert_same_network(actual, expected):
    assert type(actual) is type(expected)
    states = actual.state_dict(), expected.state_dict()
    assert list(states[0]) == list(states[1])
    for name, tensor in states[1].items():
        assert torch.equal(states[0][name], tensor)
        assert states[0][name].dtype == tensor.dtype
    policies = [[holder.policies for holder in policy_holders(model).values()] for model in (actual, expected)]
    assert policies[0] == policies[1]


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {key: value for key, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", REVERSIBLE_MODELS)
def test_each_model_returns_from_its_folder(name, tmp_path):
    model = REVERSIBLE_MODELS[name](policy=Store()).double().eval()
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert_same_network(loaded, model)
    x = model_input(model)
    with torch.no_grad():
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        actual = loaded(x)
    assert torch.equal(actual, expected)
    assert not loaded.training


def test_restores_what_was_changed_after_construction(tmp_path):
    model = tiny()
    set_policy(model, Checkpoint())
    model.stages[0].reversible.set_policies([Reverse(hold="f", keep=("g.convolution",)), Reverse(hold=True)])
    model.stem.set_policies(Offload(overlap=True))
    set_coupling(model, FixedPoint(12))
    model.stages[1].downsample.f.norm1 = nn.BatchNorm2d(2, momentum=None)
    set_tolerance(model, 1e-3)
    model.stages[1].reversible.tolerance = None
    model.reset_classifier(5)
    model.to(memory_format=torch.channels_last)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert_same_network(loaded, model)
    assert loaded.num_classes == 5
    assert loaded.stages[0].reversible.blocks[0].coupling == FixedPoint(12)
    assert [loaded.stages[stage].reversible.tolerance for stage in (0, 1)] == [1e-3, None]
    norm = loaded.stages[1].downsample.f.norm1
    assert (type(norm), norm.momentum) == (nn.BatchNorm2d, None)
    norm = loaded.stages[1].downsample.f.norm2
    assert (type(norm), norm.momentum, norm.eps) == (BatchNorm2dBiased, 0.01, 1e-3)
    assert loaded.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(x), model.eval()(x))


def test_card_of_the_current_folder_names_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny().save_pretrained(".")
    assert f"# {tmp_path.name}\n" in (tmp_path / "README.md").read_text()


def test_keeps_pooling_and_dropout_of_the_head(tmp_path):
    model = tiny()
    model.drop_rate = 0.5
    model.reset_classifier(5, "max")
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert (loaded.num_classes, loaded.global_pool, loaded.drop_rate) == (5, "max", 0.5)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(x), model.eval()(x))

    model.reset_classifier(0, "")
    model.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path)(x), model(x))
    assert from_pretrained(tmp_path, num_classes=3)(x).shape == (2, 3)

    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (({"global_pool": "sum"}, "`global_pool`"), ({"drop_rate": "1"}, "`drop_rate`")):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(CheckpointError, match=rf"cannot be rebuilt: {message}"):
            from_pretrained(tmp_path)


def test_refuses_what_a_file_would_forget(tmp_path):
    model = tiny()
    model.prune_intermediate_layers([0])
    with pytest.raises(ValueError, match="this RevNet has lost stages by `prune_intermediate_layers`"):
        model.save_pretrained(tmp_path)
    model = ReversibleTransformer(vocab_size=11, dim=8, depth=2, num_heads=2, max_length=8, form="stored")
    convert(model, blocks="blocks.blocks")
    block = model.blocks.blocks[0]
    converted = type(block)
    for kind in (type("Sharded", (converted,), {}), converted):  # `fully_shard` replaces the class once more.
        block.__class__ = kind
        with pytest.raises(ValueError, match=r"`blocks\.blocks\.0` is a converted block, which a file cannot describe"):
            model.save_pretrained(tmp_path)
    convert(model, back=True)
    model.save_pretrained(tmp_path)


def test_keeps_the_numbers_of_low_precision(tmp_path):
    model = tiny().bfloat16()
    model.save_pretrained(tmp_path)
    assert_same_network(from_pretrained(tmp_path), model)


@pytest.mark.parametrize("default", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rounds_no_number(tmp_path, dtype, default):
    network = tiny().to(dtype)
    network.stem[0].weight.data.fill_(1 + 2 * torch.finfo(dtype).eps)
    network.save_pretrained(tmp_path)
    try:
        torch.set_default_dtype(default)
        assert_same_network(RevNet.from_pretrained(tmp_path), network)
    finally:
        torch.set_default_dtype(torch.float32)


def test_keeps_labels_and_entries_of_the_user(tmp_path):
    tiny().save_pretrained(tmp_path, config={"label_names": ["cat", "dog", "frog"], "mine": [1, {"a": None}]})
    loaded = from_pretrained(tmp_path)
    assert loaded.pretrained_config == {"label_names": ["cat", "dog", "frog"], "mine": [1, {"a": None}]}
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "config.json").read_text()
    assert "label_names" not in from_pretrained(tmp_path, num_classes=7).pretrained_config
    with pytest.raises(ValueError, match=r"`label_names` \(of length 2\) must have one name for each of 3 classes"):
        tiny().save_pretrained(tmp_path, config={"label_names": ["cat", "dog"]})
    with pytest.raises(ValueError, match=r"`config` .* must hold values that JSON has"):
        tiny().save_pretrained(tmp_path, config={"mine": torch.ones(1)})


def test_arguments_replace_the_saved_ones(tmp_path):
    tiny().save_pretrained(tmp_path)
    twin = RevNet.from_pretrained(tmp_path, policy=Store())
    assert set(twin.stages[0].reversible.policies) == {Store()}
    assert RevNet.from_pretrained(tmp_path, num_classes=7).head.out_features == 7
    with pytest.raises(TypeError, match=r"RevNet has no argument `color`; leave it out\."):
        RevNet.from_pretrained(tmp_path, color=1)
    with pytest.raises(CheckpointError, match=r"`stem.0.weight` is \(4, 3, 3, 3\) in the file and \(4, 1, 3, 3\)"):
        RevNet.from_pretrained(tmp_path, in_channels=1)


def test_the_copy_of_a_network_can_be_saved(tmp_path):
    model = copy.deepcopy(tiny())
    model.save_pretrained(tmp_path)
    assert_same_network(RevNet.from_pretrained(tmp_path), model)
    compiled = torch.compile(tiny(), backend="eager")
    compiled.save_pretrained(tmp_path)
    assert_same_network(RevNet.from_pretrained(tmp_path), compiled._orig_mod)


class Widened(RevNet):
    def __init__(self, factor, *, num_classes=2):
        super().__init__(num_blocks=(1,), widths=(2 * factor, 2 * factor), num_classes=num_classes)


def test_a_class_of_the_user_remembers_its_own_arguments(tmp_path):
    model = Widened(3)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["factor"] == 3
    assert_same_network(from_pretrained(tmp_path), model)


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class WithNorm(HubMixin, nn.Sequential):
    def __init__(self, kind: str):
        norm = {"own": Doubled, "volumes": nn.BatchNorm3d}[kind]
        super().__init__(nn.BatchNorm2d(4), norm(4, eps=0.1))


@pytest.mark.parametrize("kind", ["own", "volumes"])
def test_keeps_norms_of_other_classes(tmp_path, kind):
    network = nn.SyncBatchNorm.convert_sync_batchnorm(WithNorm(kind)) if kind == "volumes" else WithNorm(kind)
    network[1].momentum = 0.3
    network.save_pretrained(tmp_path)
    copied = WithNorm.from_pretrained(tmp_path)
    assert [type(norm) for norm in copied] == [nn.BatchNorm2d, Doubled if kind == "own" else nn.BatchNorm3d]
    assert (copied[1].eps, copied[1].momentum) == (0.1, 0.3)


def define_again():
    class Redefined(HubMixin, nn.Linear):
        def __init__(self, width: int = 2):
            super().__init__(width, width)

    return Redefined


def test_a_class_that_is_defined_again_takes_the_place_of_the_first(tmp_path):
    first, second = define_again(), define_again()
    second().save_pretrained(tmp_path)
    assert type(second.from_pretrained(tmp_path)) is second
    assert type(from_pretrained(tmp_path)) is second
    assert type(first.from_pretrained(tmp_path)) is first


class Standard(PyTorchModelHubMixin, RevNet):
    pass


def test_the_mixin_of_huggingface_hub_reads_the_folder(tmp_path):
    model = tiny().eval()
    model.save_pretrained(tmp_path)
    loaded = Standard.from_pretrained(tmp_path, strict=True)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(loaded(x), model(x))
    # The other way round, the folder has the arguments only.
    loaded.save_pretrained(tmp_path / "standard")
    assert "revnet_version" not in (tmp_path / "standard" / "config.json").read_text()
    assert torch.equal(RevNet.from_pretrained(tmp_path / "standard")(x), model(x))


def test_the_methods_have_the_arguments_of_the_mixin():
    ours, theirs = (
        {name: set(inspect.signature(getattr(cls, name)).parameters) for name in ("from_pretrained", "push_to_hub")}
        for cls in (HubMixin, PyTorchModelHubMixin)
    )
    patterns = {"allow_patterns", "ignore_patterns", "delete_patterns"}  # passed on
    assert theirs["from_pretrained"] - ours["from_pretrained"] == set()
    assert theirs["push_to_hub"] - ours["push_to_hub"] - patterns == {"model_card_kwargs"}


def test_tensors_have_the_names_of_the_network(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_card_has_metadata_and_is_kept(tmp_path):
    tiny().save_pretrained(tmp_path, repo_id="owner/name")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "revnet"
    assert card.data.pipeline_tag == "image-classification"
    assert {"revnet", "pytorch_model_hub_mixin"} <= set(card.data.tags)
    assert 'RevNet.from_pretrained("owner/name")' in card.text
    (tmp_path / "README.md").write_text("mine")
    tiny().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_refuses_a_network_that_a_file_cannot_describe(tmp_path):
    class Own(FixedPoint):
        pass

    model = tiny()
    set_coupling(model, Own())
    with pytest.raises(ValueError, match=r"`stages.0.reversible.blocks.0` has the coupling .* which a file cannot"):
        model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"`stem.0.weight` is on the meta device"):
        tiny().to("meta").save_pretrained(tmp_path)
    for change, difference in (
        (lambda model: nn.utils.parametrizations.weight_norm(model.head), "a new one lacks .*parametrizations"),
        (lambda model: model.add_module("more", nn.Linear(1, 1)), "a new one lacks the tensor `more.bias`"),
        (lambda model: setattr(model, "head", nn.Linear(8, 5)), r"`head.bias` is \(3,\) in the file and \(5,\) in the"),
    ):
        model = tiny()
        change(model)
        with pytest.raises(ValueError, match=f"this RevNet was changed in a way that a file cannot .*: {difference}"):
            model.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()

    class WithModule(RevNet):
        def __init__(self, *, inner):
            super().__init__(num_blocks=(1,), widths=(4, 4))
            self.inner = inner

    with pytest.raises(ValueError, match=r"`inner` \(=ReLU\) of WithModule cannot be written to config.json"):
        WithModule(inner=nn.ReLU()).save_pretrained(tmp_path)


class OwnPolicy(Reverse):
    pass


def test_leaves_out_a_policy_that_a_file_cannot_describe(tmp_path):
    model = tiny(policy=OwnPolicy())
    model.stages[1].reversible.set_policies(Reverse(keep=torch.ops.aten.mm))
    model.save_pretrained(tmp_path)
    assert set(from_pretrained(tmp_path).stages[0].reversible.policies) == {Reverse()}


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "nowhere/", "weights.safetensors"])
def test_names_a_path_that_does_not_exist(name):
    with pytest.raises(CheckpointError, match=r"`.+` does not exist; pass the folder of a run, or a folder that"):
        from_pretrained(name)


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    tiny().save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"`pretrained_model_name_or_path` \(=''\) must be a path or owner/name"):
        from_pretrained("")


def test_does_not_save_to_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(ValueError, match=r"`save_directory` \(='file'\) must be a folder, but is a file"):
        tiny().save_pretrained("file")
    assert path.read_text() == "mine"


def test_rejects_a_folder_without_a_model(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"holds no model.safetensors with a config.json, and no last.safetensors"
    ):
        from_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"`pretrained_model_name_or_path` \(=3\) must be a path or owner/name"):
        from_pretrained(3)
    with pytest.raises(TypeError, match=r"`revision` \(=3\) must be a branch, a tag or a commit"):
        Download(revision=3)


def test_rejects_a_config_of_another_version(tmp_path):
    tiny().save_pretrained(tmp_path)
    change_config(tmp_path, revnet_format="2", revnet_version="9.0")
    here = revnet.__version__
    with pytest.raises(CheckpointError, match=rf"has format 2 of revnet 9.0, this is revnet {here} .*; update revnet"):
        from_pretrained(tmp_path)
    change_config(tmp_path, revnet_format="1", widths="wide")
    with pytest.raises(CheckpointError, match=r"cannot be rebuilt \(it was written by revnet 9.0, this is .*`widths`"):
        from_pretrained(tmp_path)
    change_config(tmp_path, architectures=["RevNet3000"])
    with pytest.raises(CheckpointError, match=r"holds a RevNet3000, which this revnet does not know .*; update revnet"):
        from_pretrained(tmp_path)


def test_rejects_the_files_of_another_library(tmp_path):
    tiny().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"], "hidden_size": 8}')
    with pytest.raises(CheckpointError, match=r"is not a model of revnet \(it says BertModel\): its config.json"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config.json` is not a JSON object"):
        from_pretrained(tmp_path)


def test_rejects_weights_of_another_model(tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a RevNet, not a ResNet; use `RevNet.from_pretrained`, or"):
        ResNet.from_pretrained(tmp_path)
    other = create_model("resnet32", num_classes=3)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit its RevNet: .*; pass the weights of that model"):
        RevNet.from_pretrained(tmp_path)


def test_strict_is_about_missing_and_superfluous_tensors(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["head.bias"]
    save_file(tensors | {"other": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"it lacks the tensor `head.bias`"):
        RevNet.from_pretrained(tmp_path)
    loaded = RevNet.from_pretrained(tmp_path, strict=False)
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_rejects_damaged_files(tmp_path):
    tiny().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged: its content has changed since revnet wrote it"):
        from_pretrained(tmp_path)
    path.write_bytes(content[:100])
    with pytest.raises(CheckpointError, match=r"is truncated or not a safetensors file"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": [10**9, 1]}, "num_blocks"),
        ({"num_blocks": [9000, 1]}, "far larger than the tensors"),
        ({"widths": [[4], 4, 8]}, "lists in lists"),
        ({"num_classes": 10**12}, "enormous"),
        ({"policies": {"*": "magic"}}, "must name one of reverse"),
        ({"policies": {"*": ["store"]}}, "has 1 entries|not"),
        ({"policies": {"nowhere": "store"}}, "which the model does not have"),
        ({"policies": {"*": {"name": "reverse", "keep": "x" * 9}}}, "keep"),
        ({"couplings": {"*": {"name": "fixed_point", "fraction_bits": 10**9}}}, "fraction_bits"),
        ({"couplings": {"*": {"name": "additive", "x": 1}}}, "x"),
        ({"couplings": [1]}, "must be an object"),
        ({"batch_norms": {"*": {"name": "BatchNorm2dBiased", "eps": -1}}}, "eps"),
        ({"batch_norms": {"*": {"name": "Linear"}}}, "must name one of"),
        ({"tolerances": {"*": 7}}, "tolerance"),
    ],
)
def test_rejects_a_hostile_config(changes, message, tmp_path):
    tiny().save_pretrained(tmp_path)
    change_config(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (NICE, {"num_hidden": 1}),
        (Glow, {"num_scales": 2, "num_steps": 2}),
        (RealNVP, {"num_couplings": 1, "num_blocks": 1}),
    ],
)
def test_a_density_returns_with_its_inverse(make, sizes, tmp_path):
    model = make(image_shape=(1, 8, 8), hidden_dim=4, **sizes)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert_same_network(loaded, model)
    codes = torch.randn(2, 64)
    assert torch.equal(loaded.inverse(codes), model.eval().inverse(codes))


def test_a_network_for_volumes_returns(tmp_path):
    model = UNet3d(widths=(4, 8), in_channels=1, num_classes=2, num_decoder_blocks=1)
    model.save_pretrained(tmp_path)
    loaded = UNet3d.from_pretrained(tmp_path)
    assert_same_network(loaded, model)
    x = torch.rand(1, 1, 4, 4, 4)
    assert torch.equal(loaded(x), model.eval()(x))


def test_a_hashing_transformer_keeps_its_exact_coupling(tmp_path):
    model = ReversibleTransformer(
        vocab_size=5, dim=8, depth=1, num_heads=2, max_length=16, attention="lsh", bucket_size=4
    )
    model.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).blocks[0].coupling == FixedPoint()


@pytest.mark.parametrize(
    "coupling", [Scaled.consistent(0.5), ExactScaled(Scaled.dual(0.5, 0.5), 12), BDIA(0.25)], ids=str
)
def test_a_coupling_with_arguments_is_restored(tmp_path, coupling):
    model = create_model("revnet38", num_classes=3)
    set_coupling(model, coupling)
    model.save_pretrained(tmp_path)
    assert from_pretrained(tmp_path).stages[0].reversible.blocks[0].coupling == coupling
    config = json.loads((tmp_path / "config.json").read_text())
    config["couplings"] = {"*": {"name": "exact_scaled", "scaled": {"name": "scaled", "a": {"name": "momentum"}}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cannot be rebuilt"):
        from_pretrained(tmp_path)
