"""`benchmarks/forms.py` with small settings."""

import csv
from importlib import import_module

import pytest

SMALL = ["--depth", "2", "--dim", "8", "--length", "16", "--batch-size", "2", "--lr", "0.01"]


@pytest.fixture
def forms(tmp_path, monkeypatch):
    """Return the script, whose continuations are short, and a function that runs it."""
    script = import_module("forms")
    monkeypatch.setattr(script, "GENERATED", 8)
    monkeypatch.setattr(script, "VALIDATION_WINDOWS", 4)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 30)
    folders = ["--work-dir", str(tmp_path / "work"), "--out-dir", str(tmp_path)]

    def run(*arguments):
        script.main(["--data", str(tmp_path / "text.txt"), *SMALL, *folders, *arguments])
        page, *others = sorted(tmp_path.glob("forms*"), key=lambda path: path.suffix, reverse=True)
        with min(others, key=lambda path: len(path.name)).open(newline="") as file:
            return page.read_text(), list(csv.DictReader(file))

    return script, run


def test_trains_the_pieces_that_are_missing(forms, capsys, monkeypatch):
    script, run = forms
    run("--num-updates", "3", "--only", "stored", "midpoint")
    capsys.readouterr()
    monkeypatch.setattr(script, "_generate", lambda model, text: pytest.fail("trained a finished piece"))
    page, rows = run("--num-updates", "3", "--report")
    assert [row["form"] for row in rows] == ["stored", "midpoint"]
    assert all(row["is_generation_equal"] == "True" for row in rows)
    assert "| midpoint | float | float32 |" in page
    assert "## " not in page


def test_a_stopped_piece_ends_as_one_that_was_not_stopped(forms, monkeypatch, tmp_path):
    script, run = forms
    arguments = ["--num-updates", "6", "--only", "midpoint_exact"]
    monkeypatch.setattr(script, "SAVE_EVERY", 2)
    monkeypatch.setattr(script, "REPORT_EVERY", 4)
    update = script._update

    def stop(*arguments):
        if arguments[-1] == 5:
            raise KeyboardInterrupt
        update(*arguments)

    monkeypatch.setattr(script, "_update", stop)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    monkeypatch.setattr(script, "_update", update)
    _, (resumed,) = run(*arguments)
    _, (straight,) = run(*arguments, "--work-dir", str(tmp_path / "other"))
    assert resumed["val_loss"] == straight["val_loss"]
    assert float(resumed["drift"]) == 0


def test_refuses_to_report_nothing(forms, capsys):
    _, run = forms
    with pytest.raises(SystemExit, match="2"):
        run("--report")
    assert "no piece is finished; leave out --report" in capsys.readouterr().err
