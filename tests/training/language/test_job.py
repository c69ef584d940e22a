"""Training a language model, from the settings to the files of a run."""

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from revnet.data import load_text
from revnet.errors import BudgetError, CheckpointError, DataError
from revnet.memory import measure
from revnet.models import ReversibleTransformer
from revnet.nn import Store
from revnet.training import (
    LanguageConfig,
    load_classifier,
    load_density,
    load_language_model,
    train,
)
from tests.training.samples import RUN_FILES, SMALL_LANGUAGE_RUN, assert_same_run, read_log, train_and_resume

SMALL = SMALL_LANGUAGE_RUN
RHYME = "Hickory, dickory, dock, the mouse ran up the clock.\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "rhyme.txt"
    path.write_text(RHYME * 40)
    return str(path)


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A run of two epochs in a shared folder: do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "lm"
    return train(LanguageConfig(data=text, out_dir=str(folder), **SMALL), quiet=True)


def test_run_writes_its_files(trained):
    assert sorted(path.name for path in trained.folder.iterdir()) == RUN_FILES


def test_loss_decreases_and_is_reported(trained):
    first, second = read_log(trained.folder)
    assert float(second["val_loss"]) < float(first["val_loss"]) < 4
    assert trained.val_loss == trained.best_val_loss == float(second["val_loss"])
    summary = json.loads((trained.folder / "summary.json").read_text())
    assert (summary["val_loss"], summary["data"], summary["attention"]) == (trained.val_loss, "rhyme", "full")
    assert f"validation loss    {trained.val_loss:.4f} nats/character (" in trained.report()


def test_validation_loss_covers_all_windows(trained, text):
    model, dataset = load_language_model(trained.folder), load_text(text)
    windows = dataset.validation[: 12 * 16 + 1].long()
    logits = model(windows[:-1].view(12, 16))
    loss = F.cross_entropy(logits.flatten(0, 1), windows[1:])
    torch.testing.assert_close(loss.item(), trained.best_val_loss, rtol=1e-5, atol=0)  # sums in a different order


def test_memory_equals_measured_model_and_stored_twin(trained):
    expected = []
    for policy in (None, Store()):
        sizes = {"dim": 16, "depth": 2, "num_heads": 2, "max_length": 16}
        model = ReversibleTransformer(vocab_size=len(set(RHYME)), policy=policy, **sizes)
        expected.append(measure(model, torch.zeros(8, 16, dtype=torch.int64)).activation_bytes)
    assert [trained.peak_bytes, trained.stored_peak_bytes] == expected
    assert trained.peak_bytes < trained.stored_peak_bytes


@pytest.mark.parametrize(
    "more",
    [
        pytest.param({"dropout": 0.1}, id="dropout"),
        pytest.param({"memory_budget": "400KiB"}, id="planned", marks=pytest.mark.slow),
        pytest.param({"attention": "lsh", "bucket_size": 4}, id="lsh", marks=pytest.mark.slow),
        pytest.param({"attention": "hierarchical", "block_size": 4}, id="hierarchical", marks=pytest.mark.slow),
    ],
)
def test_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch, text, more):
    settings = SMALL | {"data": text, "epochs": 3} | more  # dropout and hashes are random
    straight, resumed = train_and_resume(LanguageConfig(**settings), tmp_path, monkeypatch, stop_after=1)
    assert_same_run(straight, resumed)
    assert (straight.policy == "plan") == ("memory_budget" in more)


def test_epoch_reads_the_length_of_the_text(out_dir, text):
    settings = SMALL | {"updates_per_epoch": None, "epochs": 1}
    train(LanguageConfig(data=text, out_dir=out_dir, **settings), quiet=True)
    (row,) = read_log(Path(out_dir))
    assert int(row["updates"]) == round(0.9 * len(RHYME) * 40) // (8 * 16)
    assert LanguageConfig.load(Path(out_dir, "config.yaml")).updates_per_epoch == int(row["updates"])


def test_generates_characters_of_the_vocabulary(trained):
    model = load_language_model(trained.folder)
    options = {"temperature": 0.8, "top_k": 5}
    texts = [model.generate("the ", 50, generator=torch.Generator().manual_seed(seed), **options) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 50
    assert set(texts[0]) <= set(RHYME)


def test_rejects_invalid_prompts(trained):
    model = load_language_model(trained.folder)
    with pytest.raises(ValueError, match=r"`prompt` has the character 'Ä', which is not among"):
        model.generate("Ä", 1)
    with pytest.raises(ValueError, match=r"`prompt` \(=''\) must not be empty"):
        model.generate("", 1)


def test_rejects_other_kinds_of_weights(trained, finished):
    with pytest.raises(CheckpointError, match=r"holds a language model, not a classifier; use `revnet generate`"):
        load_classifier(trained.folder)
    with pytest.raises(CheckpointError, match=r"holds a language model, not a density of images; use"):
        load_density(trained.folder)
    with pytest.raises(CheckpointError, match=r"holds a classifier, not a language model; use `revnet evaluate` or"):
        load_language_model(finished.folder)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data": None}, ValueError, r"`data` is required: a text file"),
        ({"data": "nothing.txt"}, DataError, r"nothing.txt'\) does not exist; pass a text file"),
        ({"length": 208}, ValueError, r"208 for validation, too few for windows of `length` \(=208\) plus one"),
        ({"memory_budget": "1KiB"}, BudgetError, r"`memory_budget` \(='1KiB'\) is "),
    ],
)
def test_rejects_invalid_settings_before_writing(tmp_path, monkeypatch, text, settings, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        train(LanguageConfig(**{"data": text} | SMALL | settings))
    assert not list(tmp_path.iterdir())
