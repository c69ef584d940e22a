"""`benchmarks/listops.py`: the task next to an independent evaluator, and the smallest run."""

import csv
import random
import re
from importlib import import_module

import pytest


@pytest.fixture
def task():
    return import_module("_listops_task")


def evaluate(text):
    """Replace innermost lists by their values until one digit is left."""

    def value(match):
        operator, *digits = match.group(0).strip("[]").split()
        digits = sorted(map(int, digits))
        if operator == "MIN":
            return str(digits[0])
        if operator == "MAX":
            return str(digits[-1])
        if operator == "SM":
            return str(sum(digits))[-1]
        middle = len(digits) // 2
        return str(digits[middle] if len(digits) % 2 else (digits[middle - 1] + digits[middle]) // 2)

    while "[" in text:
        text = re.sub(r"\[[A-Z]+ [\d ]+\]", value, text)
    return int(text)


def test_the_evaluator_knows_the_examples_of_the_paper():
    assert evaluate("[MAX 2 9 [MIN 4 7 ] 0 ]") == 9
    assert evaluate("[MAX 4 3 [MIN 2 3 ] 1 0 [MED 1 5 8 9 2 ] ]") == 5
    assert evaluate("[SM 9 9 [MED 1 2 ] ]") == 9


def test_answers_equal_an_independent_evaluator(task):
    rng = random.Random(0)
    seen = set()
    for _ in range(300):
        tokens, answer = task.draw_sequence(rng, 16, 128)
        assert 16 <= len(tokens) <= 128
        assert evaluate(" ".join(tokens)) == answer
        seen |= set(tokens)
    assert seen == set(task.VOCABULARY) - {"<pad>"}


def test_lists_stay_within_the_rules(task):
    rng = random.Random(1)
    deepest = 0
    for _ in range(100):
        tokens, _ = task.draw_sequence(rng, 128, 512)
        counts, depth = [], 0
        for token in tokens:
            if token in task.OPERATORS:
                counts.append(0)
                depth = max(depth, len(counts))
            elif token == "]":
                assert 2 <= counts.pop() <= 10
                if counts:
                    counts[-1] += 1
            else:
                counts[-1] += 1
        assert counts == []
        deepest = max(deepest, depth)
    assert 5 < deepest <= 10


def test_examples_are_padded_at_the_end(task):
    examples = task.make_examples((8, 64), 40, seed=0)
    tokens, mask, answers = examples.batch(8, seed=5)
    assert tokens.shape == mask.shape == (8, int(mask.sum(1).max()))
    for row, length in enumerate(mask.sum(1).tolist()):
        assert mask[row, :length].all()
        assert (tokens[row, length:] == 0).all()
        assert evaluate(" ".join(task.VOCABULARY[token] for token in tokens[row, :length])) == answers[row]
    again = task.make_examples((8, 64), 40, seed=0)
    assert again == examples
    assert task.make_examples((8, 64), 40, seed=1) != examples


def test_examples_come_back_from_the_folder(task, tmp_path, monkeypatch):
    examples = task.load_examples(tmp_path, (8, 64), 12, seed=0)
    monkeypatch.setattr(task, "make_examples", lambda *args, **kwargs: pytest.fail("made again"))
    assert task.load_examples(tmp_path, (8, 64), 12, seed=0) == examples


def run(folder, *extra):
    arguments = ["--shortest", "8", "--longest", "48", "--examples", "60", "--updates", "50", "--batch-size", "4"]
    arguments += ["--seeds", "0", "--long", "256", "--out-dir", str(folder), "--runs", str(folder / "runs")]
    import_module("listops").main([*arguments, *extra])


@pytest.mark.slow
def test_writes_page_and_tables(tmp_path, capsys, monkeypatch):
    run(tmp_path)
    (page,) = tmp_path.glob("*.md")
    text = page.read_text()
    assert text in capsys.readouterr().out
    assert "| a guess |  | 10.0 %" in text
    (table,) = (path for path in tmp_path.glob("*.csv") if "curves" not in path.name)
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["attention"] for row in rows] == ["hierarchical", "full"]
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    monkeypatch.setattr("listops.train", lambda *args: pytest.fail("a finished training ran again"))
    run(tmp_path)


def test_usage_errors(tmp_path, capsys):
    for arguments, message in (
        (["--shortest", "3"], "--shortest must be at least 4"),
        (["--shortest", "64", "--longest", "32"], "at most --longest"),
        (["--updates", "5"], "--updates at least 10"),
        (["--seeds", "-1"], "--seeds not negative"),
    ):
        with pytest.raises(SystemExit):
            run(tmp_path, *arguments)
        assert message in capsys.readouterr().err
