"""`benchmarks/duplication.py`: the task, the kinds of attention, and the smallest run."""

import csv
from importlib import import_module

import pytest
import torch


@pytest.fixture
def duplication():
    return import_module("duplication")


def test_a_sequence_repeats_a_word_between_zeros(duplication):
    tokens, targets = duplication.make_batch(5, 12, seed=3)
    assert tokens.shape == targets.shape == (5, 11)
    assert torch.equal(tokens[:, 0], torch.zeros(5, dtype=torch.long))
    assert torch.equal(tokens[:, 6], torch.zeros(5, dtype=torch.long))
    word = tokens[:, 1:6]
    assert word.min() >= 1
    assert torch.equal(tokens[:, 7:], word[:, :-1])
    assert torch.equal(targets[:, 6:], word)
    assert (targets[:, :6] == -100).all()
    assert not torch.equal(tokens, duplication.make_batch(5, 12, seed=4)[0])
    words, _ = duplication.make_batch(200, 64, seed=0)
    assert set(words.unique().tolist()) == set(range(128))


def test_one_bucket_holds_all_tokens(duplication):
    model = duplication.Duplicator(32)
    tokens, _ = duplication.make_batch(2, 32, seed=0)
    model.set_hashes(None)
    outputs = []
    for seed in (0, 1):  # rotations would differ
        torch.manual_seed(seed)
        outputs.append(model(tokens))
    assert torch.equal(*outputs)
    model.set_hashes(1)
    torch.manual_seed(0)
    assert not torch.equal(model(tokens), outputs[0])


def test_no_token_sees_the_symbol_that_it_predicts(duplication):
    model = duplication.Duplicator(16)
    model.set_hashes(None)
    tokens, _ = duplication.make_batch(2, 16, seed=0)
    changed = tokens.clone()
    changed[:, 10:] = 5
    assert torch.equal(model(tokens)[:, :10], model(changed)[:, :10])
    assert not torch.equal(model(tokens)[:, 10:], model(changed)[:, 10:])


def run(folder, *extra):
    arguments = ["--length", "8", "--updates", "60", "--batch-size", "4", "--out-dir", str(folder), "--runs"]
    import_module("duplication").main([*arguments, str(folder / "runs"), *extra])


@pytest.mark.slow
def test_writes_page_and_tables(tmp_path, capsys):
    run(tmp_path)
    (page,) = tmp_path.glob("*.md")
    assert page.read_text() in capsys.readouterr().out
    (table,) = (path for path in tmp_path.glob("*.csv") if "curves" not in path.name)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["trained"] for row in rows] == ["full", "LSH-4", "LSH-2", "LSH-1"]
    assert all(0 <= float(row[kind]) <= 1 for row in rows for kind in ("full", "LSH-8", "LSH-4", "LSH-2", "LSH-1"))


@pytest.mark.slow
def test_an_interrupted_training_ends_with_the_same_losses(tmp_path, monkeypatch, duplication):
    class Stop(Exception):
        pass

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, "--trained", "LSH-2")
    make_batch = duplication.make_batch

    def stopping(batch_size, length, seed):
        if seed == 55:
            raise Stop
        return make_batch(batch_size, length, seed)

    monkeypatch.setattr(duplication, "make_batch", stopping)
    with pytest.raises(Stop):
        run(parts, "--trained", "LSH-2")
    monkeypatch.setattr(duplication, "make_batch", make_batch)
    run(parts, "--trained", "LSH-2")
    names = [next((folder / "runs").glob("*.json")).read_text().split('"seconds"')[0] for folder in (whole, parts)]
    assert names[0] == names[1]


def test_usage_errors(tmp_path, capsys):
    for arguments, message in (
        (["--length", "7"], "--length must be even"),
        (["--updates", "0"], "--updates must be from 1"),
        (["--seed", "10"], "--seed from 0 to 9"),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, *arguments)
        assert message in capsys.readouterr().err
