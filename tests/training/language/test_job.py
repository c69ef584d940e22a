"""Training a language model, from the settings to the folder of a run, and what is read from it."""

import csv
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
    TrainingInterrupted,
    load_classifier,
    load_density,
    load_language_model,
    resume,
    train,
)
from revnet.training.run.callbacks import RunFiles

SMALL = {
    "length": 16,
    "depth": 2,
    "dim": 16,
    "num_heads": 2,
    "batch_size": 8,
    "epochs": 2,
    "updates_per_epoch": 5,
    "lr": 1e-2,
    "num_threads": 1,
}
RHYME = "Hickory, dickory, dock, the mouse ran up the clock.\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "rhyme.txt"
    path.write_text(RHYME * 40)
    return str(path)


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A run of two epochs. Its folder is shared: do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "lm"
    return train(LanguageConfig(data=text, out_dir=str(folder), **SMALL), quiet=True)


def read_log(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_the_files_of_any_run(trained):
    assert sorted(path.name for path in trained.folder.iterdir()) == [
        "best.safetensors",
        "config.yaml",
        "last.ckpt",
        "last.safetensors",
        "learning_curve.png",
        "metrics.csv",
        "summary.json",
    ]


def test_the_loss_falls_and_the_result_tells_it(trained):
    first, second = read_log(trained.folder)
    assert float(second["val_loss"]) < float(first["val_loss"]) < 4
    assert trained.val_loss == trained.best_val_loss == float(second["val_loss"])
    summary = json.loads((trained.folder / "summary.json").read_text())
    assert (summary["val_loss"], summary["data"], summary["attention"]) == (trained.val_loss, "rhyme", "full")
    assert (
        f"validation loss    {trained.val_loss:.4f} nats/character (192 characters), last weights" in trained.report()
    )


def test_the_validation_loss_is_that_of_all_windows(trained, text):
    model, dataset = load_language_model(trained.folder), load_text(text)
    windows = dataset.validation[: 12 * 16 + 1].long()
    logits = model(windows[:-1].view(12, 16))
    loss = F.cross_entropy(logits.flatten(0, 1), windows[1:])
    torch.testing.assert_close(loss.item(), trained.best_val_loss, rtol=1e-5, atol=0)  # sums in another order


def test_memory_is_that_of_this_model_and_of_its_stored_twin(trained):
    expected = []
    for policy in (None, Store()):
        sizes = {"dim": 16, "depth": 2, "num_heads": 2, "max_length": 16}
        model = ReversibleTransformer(vocab_size=len(set(RHYME)), policy=policy, **sizes)
        expected.append(measure(model, torch.zeros(8, 16, dtype=torch.int64)).activation_bytes)
    assert [trained.peak_bytes, trained.stored_peak_bytes] == expected
    assert trained.peak_bytes < trained.stored_peak_bytes


def stop_after_epoch(monkeypatch, epoch):
    write_files = RunFiles.on_train_epoch_end

    def write_files_and_stop(self, trainer, pl_module):
        write_files(self, trainer, pl_module)
        if trainer.current_epoch + 1 == epoch:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFiles, "on_train_epoch_end", write_files_and_stop)


@pytest.mark.parametrize(
    "more",
    [
        {"dropout": 0.1},
        {"memory_budget": "400KiB"},
        {"attention": "lsh", "bucket_size": 4},
        {"attention": "hierarchical", "block_size": 4},
    ],
    ids=["dropout", "planned", "lsh", "hierarchical"],
)
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch, text, more):
    settings = SMALL | {"data": text, "epochs": 3} | more  # dropout and hashes are drawn as it goes
    straight = train(LanguageConfig(**settings, out_dir=str(tmp_path / "straight")), quiet=True)
    with monkeypatch.context() as patch:
        stop_after_epoch(patch, 1)
        with pytest.raises(TrainingInterrupted, match=r"`revnet train --resume .*stopped` continues"):
            train(LanguageConfig(**settings, out_dir=str(tmp_path / "stopped")), quiet=True)
    torch.rand(1000)  # whatever the new process does before it resumes
    resumed = resume(tmp_path / "stopped", quiet=True)
    for weights in ("last.safetensors", "best.safetensors"):
        expected, found = (load_language_model(result.folder / weights).state_dict() for result in (straight, resumed))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    times = {"step_seconds": "", "epoch_seconds": ""}
    logs = [[row | times for row in read_log(result.folder)] for result in (straight, resumed)]
    assert logs[0] == logs[1]
    assert (straight.policy == "plan") == ("memory_budget" in more)


def test_an_epoch_sees_as_many_characters_as_there_are(out_dir, text):
    settings = SMALL | {"updates_per_epoch": None, "epochs": 1}
    train(LanguageConfig(data=text, out_dir=out_dir, **settings), quiet=True)
    (row,) = read_log(Path(out_dir))
    assert int(row["updates"]) == round(0.9 * len(RHYME) * 40) // (8 * 16)
    assert LanguageConfig.load(Path(out_dir, "config.yaml")).updates_per_epoch == int(row["updates"])


def test_a_text_is_continued_in_its_own_characters(trained):
    model = load_language_model(trained.folder)
    options = {"temperature": 0.8, "top_k": 5}
    texts = [model.generate("the ", 50, generator=torch.Generator().manual_seed(seed), **options) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len(texts[0]) == 50
    assert set(texts[0]) <= set(RHYME)


def test_prompts_that_the_model_cannot_read_are_refused(trained):
    model = load_language_model(trained.folder)
    with pytest.raises(ValueError, match=r"`prompt` has the character 'Ä', which is not among"):
        model.generate("Ä", 1)
    with pytest.raises(ValueError, match=r"`prompt` \(=''\) must not be empty"):
        model.generate("", 1)


def test_other_kinds_of_weights_are_refused_with_what_takes_them(trained, finished):
    with pytest.raises(CheckpointError, match=r"holds a language model, not a classifier; use `revnet generate`"):
        load_classifier(trained.folder)
    with pytest.raises(CheckpointError, match=r"holds a language model, not a density of images; use"):
        load_density(trained.folder)
    with pytest.raises(CheckpointError, match=r"holds a classifier, not a language model; use `revnet evaluate` or"):
        load_language_model(finished.folder)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"length": 0}, ValueError, r"`length` \(=0\) must be 1 or more"),
        ({"dim": 18, "num_heads": 2}, ValueError, r"`dim` \(=18\) must be a multiple of twice `num_heads` .*; pass 20"),
        ({"attention": "sparse"}, ValueError, r"`attention` \(='sparse'\) must be `full` or `lsh` or `hierarchical`"),
        ({"block_size": 3}, ValueError, r"`block_size` \(=3\) must be even; pass 4"),
        ({"val_fraction": 0}, ValueError, r"`val_fraction` \(=0\) must be a finite number above 0 and below 1"),
        ({"dropout": 1.0}, ValueError, r"`dropout` \(=1.0\) must be a finite number from 0 to below 1"),
        ({"val_windows": 0}, ValueError, r"`val_windows` \(=0\) must be 1 or more"),
        ({"data": ""}, ValueError, r"`data` \(=''\) must not be empty"),
    ],
)
def test_every_setting_is_checked_in_one_line(settings, error, message):
    with pytest.raises(error, match=message) as caught:
        LanguageConfig(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"data": None}, ValueError, r"`data` is required: a text file"),
        ({"data": "nothing.txt"}, DataError, r"nothing.txt'\) does not exist; pass a text file"),
        ({"length": 208}, ValueError, r"208 for validation, too few for windows of `length` \(=208\) plus one"),
        ({"memory_budget": "1KiB"}, BudgetError, r"`memory_budget` \(='1KiB'\) is "),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch, text, settings, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        train(LanguageConfig(**{"data": text} | SMALL | settings))
    assert not list(tmp_path.iterdir())
