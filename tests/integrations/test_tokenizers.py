"""Byte-level BPE by the `tokenizers` library."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from revnet.data import BytePairVocabulary, load_text
from revnet.data.tokens import byte_pairs
from revnet.data.tokens.tokenizer_file import _GPT2, _GPT4, parse_tokenizer
from revnet.errors import CheckpointError
from revnet.training import LanguageConfig, LanguageModel, load_language_model, resume, train
from revnet.training.export.inference import read_inference
from revnet.training.push_run import push
from tests.data.tokens.samples import small_tokenizer
from tests.training.samples import RUN_FILES, SMALL_LANGUAGE_RUN, assert_same_run, train_and_resume

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

ROOT = Path(__file__).parent.parent.parent
TEXT = (
    "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))[:60_000]
    + "Äß 猫 🎉\r\n\t \x1c x\n\n\n y" * 20
)
SMALL = {**SMALL_LANGUAGE_RUN, "val_windows": 100}
BPE = {"tokenizer": "bpe", "vocab_size": 300}


@pytest.fixture(scope="module")
def vocabulary():
    return BytePairVocabulary.train([TEXT], 600)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT, encoding="utf-8", newline="")
    return str(path)


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A run of two epochs in a shared folder: do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "lm"
    return train(LanguageConfig(data=text, out_dir=str(folder), **BPE, **SMALL), quiet=True)


@pytest.mark.parametrize("pattern", [None, _GPT2, _GPT4, _GPT4.replace("{1,3}", "")])
def test_texts_return_unchanged_in_pieces_too(vocabulary, monkeypatch, pattern):
    import tokenizers

    tokens = BytePairVocabulary(parse_tokenizer(vocabulary.file.to_json()))
    if pattern is not None:
        file = small_tokenizer(tokens=tokens.file.tokens, merges=tokens.file.merges, pattern=pattern)
        tokens = BytePairVocabulary(file)
    (whole,) = tokens.encode_all([TEXT])
    assert len(whole) < 0.6 * len(TEXT)
    assert tokens.decode(whole) == TEXT
    assert tokens.token_bytes()[whole.long()].sum() == len(TEXT.encode())
    reference = tokenizers.Tokenizer.from_str(tokens.file.to_json())
    assert reference.encode(TEXT).ids == whole.tolist()
    assert reference.decode(whole.tolist()) == TEXT
    monkeypatch.setattr(byte_pairs, "_PIECE", 500)
    monkeypatch.setattr(byte_pairs, "_BATCH", 2000)
    assert len(list(byte_pairs._pieces(TEXT))) > 20
    pieces, empty = tokens.encode_all([TEXT, ""])
    assert torch.equal(pieces, whole)
    assert len(empty) == 0


def test_training_depends_on_the_text_alone(vocabulary):
    program = (
        "import hashlib, sys; from revnet.data import BytePairVocabulary; "
        "print(hashlib.md5(BytePairVocabulary.train([sys.stdin.read()], 600).file.to_json().encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], input=TEXT, capture_output=True, text=True, check=True, timeout=300
        ).stdout
        for _ in range(2)
    }
    assert len(digests) == 1
    # Fewer tokens are the first ones of more.
    fewer = BytePairVocabulary.train([TEXT], 400)
    assert fewer.file.tokens == vocabulary.file.tokens[:400]
    assert len(BytePairVocabulary.train(["aaaa"], 5000)) < 262


def test_names_of_special_tokens_are_text(vocabulary):
    tokens = vocabulary.encode("a<|endoftext|>b")
    assert vocabulary.end_of_text not in tokens
    assert vocabulary.decode(tokens) == "a<|endoftext|>b"
    for same in (pickle.loads(pickle.dumps(vocabulary)), copy.deepcopy(vocabulary)):
        assert same == vocabulary
        assert torch.equal(same.encode("a<|endoftext|>b"), tokens)
    with pytest.raises(ValueError, match=r"`prompt` has '\\udc80' at character 1, which UTF-8 cannot write"):
        vocabulary.encode("a\udc80", "prompt")


def test_only_the_training_part_is_learned_from(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc " * 500 + "xyz " * 50)
    dataset = load_text(path, val_fraction=200 / 2200, tokenizer="bpe", vocab_size=300)
    assert "Ġabc" in dataset.vocabulary.file.tokens
    assert not any(len(token) > 1 and "z" in token for token in dataset.vocabulary.file.tokens[1:])


def test_run_has_the_tokenizer_and_bits_per_byte(trained, text):
    assert sorted(path.name for path in trained.folder.iterdir()) == sorted([*RUN_FILES, "tokenizer.json"])
    model, dataset = load_language_model(trained.folder), load_text(text, **BPE)
    assert BytePairVocabulary.read(trained.folder / "tokenizer.json") == model.vocabulary == dataset.vocabulary
    summary = json.loads((trained.folder / "summary.json").read_text())
    predicted = dataset.validation[1 : 1 + 16 * ((len(dataset.validation) - 1) // 16)]
    assert summary["val_tokens"] == 1600 < len(predicted)
    bits = trained.val_loss * 1600 / summary["val_bytes"] / torch.tensor(2.0).log().item()
    assert summary["val_bits_per_byte"] == pytest.approx(bits)
    assert f" bits/token, {bits:.4f} bits/byte, " in trained.report()
    assert isinstance(model.generate("The ", 5), str)
    assert model.usual_prompt == "\n"


@pytest.mark.parametrize("source", ["bpe", pytest.param("file", marks=pytest.mark.slow)])
def test_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch, text, trained, source):
    tokens = BPE if source == "bpe" else {"tokenizer": str(trained.folder / "tokenizer.json")}
    config = LanguageConfig(data=text, **SMALL, **tokens)
    assert_same_run(*train_and_resume(config, tmp_path, monkeypatch, stop_after=1))


def test_runs_and_files_with_another_tokenizer_are_refused(trained, text, tmp_path):
    other = tmp_path / "tokenizer.json"
    other.write_text(small_tokenizer().to_json())
    with pytest.raises(ValueError, match=r"`vocab_size` \(=300\) is not the number of tokens in `tokenizer` .*, 261"):
        resume(trained.folder, epochs=3, tokenizer=str(other))
    same_size = BytePairVocabulary.train(["the cat and the dog " * 9, TEXT[:3000]], 300)
    other.write_text(same_size.file.to_json())
    with pytest.raises(CheckpointError, match=r"is not what the run was trained on: the tokenizer differs"):
        resume(trained.folder, epochs=3, tokenizer=str(other))
    for settings, way_out in (({}, "the tokenizer.json of its run"), ({"tokenizer": str(other)}, "the tokenizer.json")):
        with pytest.raises(CheckpointError, match=f"are of a model with another tokenizer; pass {way_out}"):
            train(
                LanguageConfig(data=text, weights=str(trained.folder), out_dir=str(tmp_path / "x"), **SMALL, **settings)
            )


def test_continues_and_starts_with_the_saved_tokenizer(trained, text, tmp_path):
    file = str(trained.folder / "tokenizer.json")
    settings = SMALL | {"data": text, "out_dir": str(tmp_path / "lm"), "weights": str(trained.folder)}
    run = train(LanguageConfig(tokenizer=file, **settings), quiet=True)
    assert run.val_loss < trained.val_loss
    again = resume(run.folder, epochs=3, tokenizer=str(run.folder / "tokenizer.json"), quiet=True)
    assert again.last_epoch == 3


def test_the_hub_and_exports_have_the_tokenizer(trained, tmp_path):
    folder = Path(push(trained.folder, "owner/name", dry_run=tmp_path / "push"))
    model, original = LanguageModel.from_pretrained(folder), load_language_model(trained.folder)
    assert model.vocabulary == original.vocabulary
    assert "Vocabulary: 300 tokens" in (folder / "README.md").read_text()
    assert "| validation bits/byte |" in (folder / "README.md").read_text()
    inference = read_inference(trained.folder)
    assert parse_tokenizer(inference.metadata["tokenizer"]) == model.vocabulary.file


def test_documents_in_tokens(tmp_path):
    path = tmp_path / "docs.jsonl"
    documents = [TEXT[3000 * number : 3000 * number + 3000] for number in range(8)]
    path.write_text("\n".join(json.dumps({"text": document}) for document in documents))
    dataset = load_text(path, tokenizer="bpe", vocab_size=300)
    end = dataset.vocabulary.end_of_text
    assert dataset.num_documents == (7, 1)
    assert (dataset.train == end).sum() == 8
    parts = " ".join(map(str, dataset.train.tolist())).split(f" {end} ")
    assert dataset.vocabulary.decode(torch.tensor(list(map(int, parts[1].split())))) == documents[1]
    run = train(LanguageConfig(data=str(path), out_dir=str(tmp_path / "lm"), **BPE, **SMALL), quiet=True)
    model = load_language_model(run.folder)
    assert model.usual_prompt == ""
    assert "<|endoftext|>" not in model.generate("", 50, generator=torch.Generator().manual_seed(0))
