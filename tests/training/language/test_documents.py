"""Training a language model on documents, from the settings to the files of a run."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from revnet.data import load_text
from revnet.errors import CheckpointError
from revnet.memory import measure
from revnet.training import LanguageConfig, LanguageModel, load_language_model, resume, train
from revnet.training.push_run import push
from tests.training.samples import RUN_FILES, SMALL_LANGUAGE_RUN, assert_same_run, train_and_resume

SMALL = SMALL_LANGUAGE_RUN
VERSES = [f"Verse {number}: hickory, dickory, dock, ä. " * (1 + number % 3) for number in range(30)]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "verses.jsonl"
    path.write_text("".join(json.dumps({"text": verse}) + "\n" for verse in VERSES))
    return str(path)


@pytest.fixture(scope="module")
def trained(lines, tmp_path_factory):
    """A run of two epochs in a shared folder: do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "lm"
    return train(LanguageConfig(data=lines, out_dir=str(folder), **SMALL), quiet=True)


def test_validation_loss_is_the_one_of_separate_documents(trained, lines):
    assert sorted(path.name for path in trained.folder.iterdir()) == RUN_FILES
    model, text = load_language_model(trained.folder), load_text(lines)
    tokens = text.validation.long()
    num_windows = (len(tokens) - 1) // 16
    losses, num_bytes = [], 0
    for window in range(num_windows):
        inputs, targets = tokens[16 * window : 16 * window + 16], tokens[16 * window + 1 : 16 * window + 17]
        starts = [0, *(place for place in range(1, 16) if inputs[place] == 0), 16]
        for start, end in pairwise(starts):
            losses.append(F.cross_entropy(model.model(inputs[None, start:end])[0], targets[start:end], reduction="sum"))
        num_bytes += len(text.vocabulary.decode(targets).replace("\0", "").encode())
    loss = sum(losses).item()
    assert trained.val_loss == pytest.approx(loss / (16 * num_windows), rel=1e-5)  # sums in a different order
    assert trained.num_val_bytes == num_bytes
    summary = json.loads((trained.folder / "summary.json").read_text())
    assert summary["val_characters"] == 16 * num_windows
    bits = loss / num_bytes / torch.tensor(2.0).log().item()
    assert summary["val_bits_per_byte"] == trained.val_bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert f"{trained.val_bits_per_byte:.4f} bits/byte" in trained.report()


def test_memory_equals_measured_model(trained):
    model = load_language_model(trained.folder).train().model
    mask = torch.ones(8, 16, dtype=torch.int64)
    measured = measure(model, torch.zeros(8, 16, dtype=torch.int64), kwargs={"mask": mask})
    assert trained.peak_bytes == measured.activation_bytes


@pytest.mark.parametrize(
    "more",
    [{}, {"chunked_loss": True, "accumulate": 2}, pytest.param({"memory_budget": "400KiB"}, marks=pytest.mark.slow)],
)
def test_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch, lines, more):
    config = LanguageConfig(data=lines, **SMALL | more)
    assert_same_run(*train_and_resume(config, tmp_path, monkeypatch, stop_after=1))


def test_documents_may_cross(tmp_path, lines, trained):
    settings = SMALL | {"cross_documents": True, "attention": "lsh", "bucket_size": 4}
    run = train(LanguageConfig(data=lines, out_dir=str(tmp_path / "lm"), **settings), quiet=True)
    assert run.val_loss != trained.val_loss
    assert load_language_model(run.folder).number_documents(torch.zeros(1, 3)) is None


def test_generates_one_document(trained, monkeypatch):
    model = load_language_model(trained.folder)
    assert model.usual_prompt == ""
    text = model.generate("", 50, generator=torch.Generator().manual_seed(0))
    assert "\0" not in text
    tokens = torch.tensor([[0, 5, 6, 0, 7]])
    monkeypatch.setattr(model.model, "generate", lambda *arguments, **options: tokens)
    assert model.generate("", 4) == model.vocabulary.decode(tokens[0, 1:3])


def test_the_hub_keeps_documents_apart(trained, tmp_path):
    folder = push(trained.folder, "owner/name", dry_run=tmp_path / "push")
    model, original = LanguageModel.from_pretrained(folder), load_language_model(trained.folder)
    tokens = torch.randint(len(original.vocabulary), (2, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens), original(tokens))
    assert not torch.equal(model(tokens), original.model(tokens))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "lsh"}, r"`attention` \(='lsh'\) cannot keep documents apart; pass `cross_documents`"),
        ({"tokenizer": "characters", "vocab_size": 300}, r"`vocab_size` \(=300\) does not go with `tokenizer`"),
        ({"tokenizer": "bpe", "vocab_size": 3}, r"`vocab_size` \(=3\) must be 257 or more"),
        ({"tokenizer": "missing.json"}, r"missing.json'\) cannot be read: No such file"),
    ],
)
def test_rejects_invalid_settings(lines, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        train(LanguageConfig(data=lines, **SMALL | settings))
    assert "\n" not in str(caught.value)


def test_rejects_crossing_in_one_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc " * 200)
    with pytest.raises(ValueError, match=r"`cross_documents` \(=True\) does not go with `data`"):
        train(LanguageConfig(data=str(path), cross_documents=True, **SMALL))


def test_resumed_run_refuses_other_tokens(trained):
    with pytest.raises(ValueError, match=r"missing.json'\) cannot be read"):
        resume(trained.folder, epochs=3, tokenizer="missing.json")


@pytest.mark.parametrize("changes", [{"documents": "separate", "characters": "ab"}, {"documents": "other"}])
def test_damaged_headers_are_refused(trained, changes):
    header = replace(load_language_model(trained.folder).header, **changes)
    with pytest.raises(CheckpointError, match=r"cannot be rebuilt: (its vocabulary has no token|`documents` )"):
        LanguageModel.from_tensors(header, {}, trained.folder)
