import csv
import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard

from revnet import Checkpoint, CheckpointError, FixedPoint
from revnet.memory import format_bytes
from revnet.models import NICE, ReversibleTransformer, RevNet, from_pretrained
from revnet.training import (
    Classifier,
    ImageDensity,
    LanguageConfig,
    LanguageModel,
    NiceConfig,
    TrainConfig,
    evaluate,
    load_classifier,
    load_density,
    load_language_model,
    push,
    train,
)
from revnet.training.classification.model import NO_PREPROCESS
from revnet.training.run.checkpoint import save_weights
from tests.models.hub_server import serve
from tests.training.samples import make_header, save_checkpoint, write_text


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return the folders of three small runs, one of each family."""
    folder = tmp_path_factory.mktemp("runs")
    shared = {"epochs": 1, "max_updates": 2}
    configs = [
        TrainConfig(
            **shared, batch_size=64, policy="checkpoint", exact=True, drift_every=1, out_dir=str(folder / "classifier")
        ),
        NiceConfig(**shared, hidden_dim=4, num_hidden=1, num_couplings=2, out_dir=str(folder / "nice")),
        LanguageConfig(
            **shared, data=write_text(folder), dim=8, depth=1, num_heads=2, length=16, out_dir=str(folder / "lm")
        ),
    ]
    for config in configs:
        train(config, quiet=True)
    return folder


FAMILIES = {
    "classifier": (RevNet, Classifier, load_classifier),
    "nice": (NICE, ImageDensity, load_density),
    "lm": (ReversibleTransformer, LanguageModel, load_language_model),
}


def assert_same_state(actual, expected):
    assert list(actual.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(tensor, actual.state_dict()[name]) for name, tensor in expected.state_dict().items())


def output(module):
    """Return the output of a module of a run."""
    torch.manual_seed(0)
    with torch.no_grad():
        if isinstance(module, LanguageModel):
            return module(torch.arange(8)[None])
        images = torch.randint(17, (2, 1, 8, 8)).to(torch.uint8)
        return module(images, torch.Generator()) if isinstance(module, ImageDensity) else module(images)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_through_folders_unchanged(family, runs, tmp_path):
    network_type, module_type, load = FAMILIES[family]
    expected = load(runs / family)
    network = network_type.from_pretrained(runs / family)
    assert_same_state(network, expected.model)
    network.save_pretrained(tmp_path / "folder")
    module = module_type.from_pretrained(tmp_path / "folder")
    module.save_pretrained(tmp_path / "again")
    for folder in ("folder", "again"):
        for copy in (load(tmp_path / folder), module_type.from_pretrained(tmp_path / folder)):
            assert_same_state(copy, expected)
            assert torch.equal(output(copy), output(expected))
        assert_same_state(from_pretrained(tmp_path / folder), expected.model)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("folder", "again")]
    assert configs[0] == configs[1]
    header, saved = vars(module.header), vars(expected.header)
    assert header | {"data": None} == saved | {"data": None}


def test_a_run_keeps_its_policy_and_its_coupling(runs):
    for network in (RevNet.from_pretrained(runs / "classifier"), Classifier.from_pretrained(runs / "classifier").model):
        assert set(network.stages[0].reversible.policies) == {Checkpoint()}
        assert network.stages[0].reversible.blocks[0].coupling == FixedPoint()


def test_best_weights_load_from_their_file(runs):
    best = load_classifier(runs / "classifier" / "best.safetensors")
    assert_same_state(RevNet.from_pretrained(runs / "classifier" / "best.safetensors"), best.model)


def test_the_card_has_the_figures_of_the_run(runs, tmp_path):
    push(runs / "classifier", "owner/digits", dry_run=tmp_path / "dry")
    text = (tmp_path / "dry" / "README.md").read_text()
    assert ModelCard(text).data.pipeline_tag == "image-classification"
    summary = json.loads((runs / "classifier" / "summary.json").read_text())
    assert f"| test accuracy | {100 * summary['test_accuracy']:.2f} % |" in text
    assert "validation accuracy" not in text  # of the best weights, which are in another file
    for key in ("peak_bytes", "stored_peak_bytes", "parameter_bytes", "optimizer_bytes"):
        if summary[key] is not None:
            assert f"| {summary[key]:,} | {format_bytes(summary[key])} |" in text
    assert "## Drift" not in text or "at most" in text
    assert "max_updates: 2" in text
    assert "out_dir" not in text
    assert str(runs) not in text
    assert summary["machine"][0] in text
    assert "Command" not in text
    assert evaluate(tmp_path / "dry").accuracy == summary["test_accuracy"]

    push(runs / "classifier" / "best.safetensors", "owner/digits", dry_run=tmp_path / "best")
    text = (tmp_path / "best" / "README.md").read_text()
    assert f"| validation accuracy | {100 * summary['best_val_accuracy']:.2f} % |" in text
    assert "best weights in validation" in text


def test_the_card_of_a_text_has_its_loss_and_no_path(runs, tmp_path):
    push(runs / "lm", "owner/text", dry_run=tmp_path)
    text = (tmp_path / "README.md").read_text() + (tmp_path / "config.json").read_text()
    assert str(runs) not in text
    assert "`text.txt`" in text
    assert "validation loss, nats/character" in text


def test_the_card_shows_the_drift(runs, tmp_path):
    folder = shutil.copytree(runs / "classifier", tmp_path / "run")
    rows = [{"update": update, "block": "blocks.1", "error": error} for update, error in ((0, 2e-6), (5, 1e-6))]
    with (folder / "drift.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    push(folder, "owner/digits", dry_run=tmp_path / "dry")
    text = (tmp_path / "dry" / "README.md").read_text()
    assert "in 2 updates: at most 2e-06 (`blocks.1`, after update 0), and at most 1e-06 in the last" in text
    (folder / "drift.csv").write_text("update,block,error\n1,b,large\n")
    with pytest.raises(CheckpointError, match=r"drift.csv` is damaged; restore the file, or move it out of the folder"):
        push(folder, "owner/digits", dry_run=tmp_path / "dry")


def test_a_card_leaves_out_what_the_run_did_not_measure(runs, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(runs / "classifier" / "last.safetensors", folder)
    push(folder, "owner/digits", dry_run=tmp_path / "dry")
    text = (tmp_path / "dry" / "README.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Use"]
    # The scores are of other weights.
    summary = json.loads((runs / "classifier" / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"last_epoch": 7}))
    push(folder, "owner/digits", dry_run=tmp_path / "dry")
    assert "## Results" not in (tmp_path / "dry" / "README.md").read_text()


def test_pushes_a_folder_with_the_card_that_was_edited(runs, tmp_path, monkeypatch):
    push(runs / "nice", "owner/nice", dry_run=tmp_path / "dry")
    (tmp_path / "dry" / "README.md").write_text("mine")
    with serve(monkeypatch, tmp_path / "cache") as hub:
        push(tmp_path / "dry", "owner/nice", private=True, commit_message="Push it")
        assert hub.repositories["owner/nice"]["main"]["README.md"] == b"mine"
        push(runs / "classifier", "owner/digits", branch="first")
        files = hub.repositories["owner/digits"]["first"]
        assert set(files) == {"README.md", "config.json", "model.safetensors", "preprocess.safetensors"}
        assert_same_state(load_classifier("hub:owner/digits@first"), load_classifier(runs / "classifier"))
        assert_same_state(
            Classifier.from_pretrained("owner/digits", revision="first"), load_classifier(runs / "classifier")
        )
        assert load_density("hub:owner/nice").header == load_density(runs / "nice").header
        copied = train(
            TrainConfig(
                epochs=1, max_updates=1, exact=True, weights="hub:owner/digits@first", out_dir=str(tmp_path / "run")
            ),
            quiet=True,
        )
        assert "weights: hub:owner/digits@first" in (copied.folder / "config.yaml").read_text()


def test_the_files_of_a_run_may_lie_on_the_hub(runs, tmp_path, monkeypatch):
    with serve(monkeypatch, tmp_path / "cache") as hub:
        hub.add("owner/run", runs / "nice")
        assert_same_state(NICE.from_pretrained("owner/run"), load_density(runs / "nice").model)
        assert_same_state(load_density("hub:owner/run"), load_density(runs / "nice"))
        assert_same_state(NICE.from_pretrained("owner/run", local_files_only=True), load_density(runs / "nice").model)


def test_rejects_what_cannot_be_pushed(runs, tmp_path):
    with pytest.raises(ValueError, match=r"`repo_id` \(='a b'\) must be a name on the Hugging Face hub"):
        push(runs / "nice", "a b")
    with pytest.raises(CheckpointError, match=r"`.*nowhere` does not exist; pass a `.safetensors`"):
        push(tmp_path / "nowhere", "owner/name")
    (checkpoint,) = (runs / "nice" / "checkpoints").glob("*.ckpt")
    with pytest.raises(CheckpointError, match=r"is a checkpoint to resume from; finish an epoch of the run, or pass"):
        push(checkpoint, "owner/name")
    with pytest.raises(
        CheckpointError, match=r"is a checkpoint to resume from, not a file of weights; pass the folder"
    ):
        from_pretrained(checkpoint)
    header = make_header(model="tests.training.own_code:make_model", preprocess=NO_PREPROCESS)
    module = Classifier(torch.nn.Linear(1, 1), torch.nn.Identity(), header)
    save_weights(module, tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"is your own code, which a file of weights cannot hold; share the code"):
        push(tmp_path / "own.safetensors", "owner/name")
    with pytest.raises(CheckpointError, match=r"its network is your own code; build the network, and load it with"):
        from_pretrained(tmp_path / "own.safetensors")
    with pytest.raises(ValueError, match=r"is your own code, which a file of weights cannot hold"):
        module.save_pretrained(tmp_path)


def test_a_network_without_a_run_is_no_classifier(tmp_path):
    RevNet(num_blocks=(1,), widths=(4, 4)).save_pretrained(tmp_path)
    for load in (load_classifier, Classifier.from_pretrained):
        with pytest.raises(CheckpointError, match=r"is a network without the labels and the preprocessing of a run"):
            load(tmp_path)


def test_another_head_loses_the_labels(tmp_path):
    save_checkpoint(tmp_path / "last.safetensors", make_header(model="revnet38"))
    network = RevNet.from_pretrained(tmp_path)
    assert network.pretrained_config["label_names"] == ["cat", "dog", "frog"]
    network.reset_classifier(5)
    network.save_pretrained(tmp_path / "folder")
    assert RevNet.from_pretrained(tmp_path / "folder").pretrained_config.keys() == {"preprocess_file"}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_the_family_of_a_folder(family, runs, tmp_path):
    from_pretrained(runs / family).save_pretrained(tmp_path)
    for other, (network_type, module_type, load) in FAMILIES.items():
        if other != family:
            for read in (module_type.from_pretrained, load):
                with pytest.raises(CheckpointError, match=r"holds a .*, not a .*; use `revnet"):
                    read(tmp_path)
            with pytest.raises(CheckpointError, match=r"holds a .*, not a .*; use `.*from_pretrained`"):
                network_type.from_pretrained(tmp_path)
