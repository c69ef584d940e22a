"""Damaged settings, texts, tables and summaries."""

import json
import shutil
import warnings
from typing import Any

import pytest
import yaml

from revnet.cli.main import main
from revnet.data import BytePairVocabulary
from revnet.data.sources.text import load_text
from revnet.data.tokens.tokenizer_file import parse_tokenizer
from revnet.errors import CheckpointError
from revnet.paper.report import write_report
from revnet.paper.tables import TABLES
from revnet.training import LanguageConfig, NiceConfig, TrainConfig, entry
from revnet.training.run.data_record import check_record
from revnet.training.run.loggers import make_loggers
from revnet.training.run.update_log import _start_file
from revnet.training.settings.run_config import read_task
from tests.damaged.damage import assert_ends_well, damage_bytes, damage_tree, other_file, seeded
from tests.data.tokens.samples import small_tokenizer

CASES = [pytest.param(range(20), id="few"), pytest.param(range(400), marks=pytest.mark.slow, id="many")]
RESUMED = [pytest.param(range(20), id="few"), pytest.param(range(300), marks=pytest.mark.slow, id="many")]
CONFIGS: dict[str, Any] = {"train": TrainConfig, "nice": NiceConfig, "lm": LanguageConfig}
ODD_YAML = ("*a", "&a [*a]", "[" * 50, "9" * 5000, "!!python/name:os.system", "2000-99-99", "\t", "{")


def damage_settings(content: bytes, draw: Any) -> bytes:
    match draw.randrange(4):
        case 0:
            return yaml.safe_dump(damage_tree(yaml.safe_load(content), draw)).encode() + b"...\n"
        case 1:
            lines = content.decode().splitlines()
            name = draw.choice(("lr", "epochs", "data", "<<"))
            lines[draw.randrange(len(lines))] = f"{name}: {draw.choice(ODD_YAML)}"
            return "\n".join(lines).encode() + b"\n...\n"
    return damage_bytes(content, draw) if draw.random() < 0.9 else other_file(draw)


@pytest.mark.parametrize("numbers", CASES)
def test_damaged_settings(tmp_path, capsys, numbers):
    path = tmp_path / "config.yaml"
    for number in numbers:
        draw = seeded("settings", number)
        name = draw.choice(list(CONFIGS))
        CONFIGS[name]().save(path)
        path.write_bytes(damage_settings(path.read_bytes(), draw))
        assert_ends_well(lambda name=name: CONFIGS[name].load(path, whole=True), f"settings {number}")
        assert_ends_well(lambda: read_task(path), f"settings {number}, task")
        words = ["train", *([] if name == "train" else [name]), "--config", str(path), "--print-config"]
        status = assert_ends_well(lambda words=words: main(words), f"settings {number}, command")
        errors = capsys.readouterr().err
        assert status in (0, 2)
        assert errors.count("\n") == (status == 2), errors


@pytest.mark.parametrize("numbers", RESUMED)
def test_resuming_with_damaged_settings(density_run, tmp_path, monkeypatch, numbers):
    folder = shutil.copytree(density_run, tmp_path / "run")
    path = folder / "config.yaml"
    content = path.read_bytes()
    started: list[Any] = []
    for function in ("execute", "run_in_processes"):
        monkeypatch.setattr(entry, function, lambda *arguments, **options: started.append(arguments))
    for number in numbers:
        draw = seeded("resumed settings", number)
        cut = draw.randrange(len(content) - 5)  # before the mark at the end
        path.write_bytes(content[:cut] if number % 2 else damage_settings(content, draw))
        started.clear()
        error = assert_ends_well(lambda: entry.resume(folder, quiet=True), f"resumed settings {number}")
        if number % 2:
            assert isinstance(error, ValueError)
            assert started == []
    path.write_bytes(content)
    started.clear()
    entry.resume(folder, quiet=True)
    assert len(started) == 1


@pytest.mark.parametrize("numbers", CASES)
def test_damaged_texts(tmp_path, numbers):
    content = ("The quick brown fox, die Käsetheke und 猫.\n" * 50).encode()
    path = tmp_path / "text.txt"
    for number in numbers:
        draw = seeded("texts", number)
        path.write_bytes(damage_bytes(content, draw) if number % 10 else other_file(draw))
        assert_ends_well(lambda: load_text(path), f"texts {number}")
    path.write_bytes(content)
    assert load_text(path).vocabulary.characters


@pytest.mark.parametrize("numbers", CASES)
def test_damaged_documents(tmp_path, numbers):
    content = "".join(json.dumps({"text": f"Fox {number}, 猫.", "id": number}) + "\n" for number in range(20)).encode()
    path = tmp_path / "text.jsonl"
    for number in numbers:
        draw = seeded("documents", number)
        lines = content.decode().splitlines()
        lines[draw.randrange(20)] = json.dumps(damage_tree(json.loads(lines[3]), draw))
        damaged = damage_bytes(content, draw) if number % 10 else other_file(draw)
        path.write_bytes("\n".join(lines).encode() if number % 2 else damaged)
        assert_ends_well(lambda: load_text(path), f"documents {number}")
    path.write_bytes(content)
    assert load_text(path).num_documents == (18, 2)


@pytest.mark.parametrize("numbers", CASES)
def test_damaged_tokenizers(tmp_path, numbers):
    content = small_tokenizer().to_json()
    path = tmp_path / "tokenizer.json"
    for number in numbers:
        draw = seeded("tokenizers", number)
        damaged = damage_bytes(content.encode(), draw) if number % 10 else other_file(draw)
        path.write_bytes(json.dumps(damage_tree(json.loads(content), draw)).encode() if number % 2 else damaged)
        tokens = assert_ends_well(lambda: BytePairVocabulary.read(path), f"tokenizers {number}")
        if isinstance(tokens, BytePairVocabulary):  # what is accepted is whole
            assert len({tokens.file.bytes_of(token) for token in range(len(tokens))}) >= 256
            assert parse_tokenizer(tokens.file.to_json()) == tokens.file
    path.write_text(content)
    assert BytePairVocabulary.read(path).file == small_tokenizer()


@pytest.mark.parametrize("numbers", CASES)
def test_damaged_tables(tmp_path, numbers):
    lines = ["update,epoch,train_loss_step,lr,samples_per_second,peak_bytes,drift"]
    lines += [f"{number},1,0.5,0.1,100.0,1000000," for number in range(1, 60)]
    content = "\r\n".join(lines).encode() + b"\r\n"
    path = tmp_path / "updates.csv"
    for number in numbers:
        draw = seeded("tables", number)
        damaged = damage_bytes(content, draw) if number % 10 else other_file(draw)
        if number % 7 == 0:
            odd = draw.choice((b"9" * 5000, b'"' + b"x" * 200_000, b"\0", b"\xc2\xb2,1"))
            damaged = content.replace(b"7,1", odd)
        path.write_bytes(damaged)
        assert_ends_well(lambda: _start_file(path, 30), f"tables {number}")
    path.write_bytes(content)
    _start_file(path, 30)
    assert path.read_bytes() == "\r\n".join(lines[:31]).encode() + b"\r\n"


@pytest.mark.parametrize("numbers", CASES)
def test_damaged_summaries(density_run, tmp_path, numbers, monkeypatch):
    monkeypatch.setattr("revnet.paper.report._draw", lambda *_: None)  # Drawing takes longer than everything else.
    table = next(table for table in TABLES.values() if "revnet38" in table.models)
    folder = tmp_path / "table" / "revnet38_seed0"
    folder.mkdir(parents=True)
    TrainConfig().save(folder / "config.yaml")
    path = folder / "summary.json"
    summary = json.loads((density_run / "summary.json").read_bytes()) | {"test_error": 0.5}
    content = json.dumps(summary).encode()
    path.write_bytes(content)
    assert len(write_report(table, folder.parent, "command")) == 1
    for number in numbers:
        draw = seeded("summaries", number)
        if number % 2:
            path.write_text(json.dumps(damage_tree(summary, draw)))
        else:
            path.write_bytes(damage_bytes(content, draw) if number % 10 else other_file(draw))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runs = assert_ends_well(lambda: write_report(table, folder.parent, "command"), f"summaries {number}")
        assert isinstance(runs, list)
        assert len(runs) + len(caught) == 1  # a run that is left out is named


@pytest.mark.parametrize("name", ["data.json", "loggers.json"])
@pytest.mark.parametrize("numbers", CASES)
def test_damaged_records(density_run, tmp_path, name, numbers):
    folder = shutil.copytree(density_run, tmp_path / "run")
    path = folder / name
    if name == "loggers.json":
        path.write_text(json.dumps({"wandb": "abc", "mlflow": "def"}))
    content = path.read_bytes()
    record = json.loads(content)
    config = NiceConfig.load(folder / "config.yaml")
    for number in numbers:
        draw = seeded(name, number)
        if number % 2:
            path.write_text(json.dumps(damage_tree(record, draw)))
        else:
            path.write_bytes(damage_bytes(content, draw) if number % 10 else other_file(draw))
        if name == "data.json":
            assert_ends_well(lambda: check_record(record, path, "digits"), f"{name} {number}")
        else:
            assert_ends_well(lambda: make_loggers(config, folder), f"{name} {number}")


def test_a_cut_off_file_does_not_continue_with_defaults(density_run, tmp_path):
    folder = shutil.copytree(density_run, tmp_path / "run")
    path = folder / "config.yaml"
    path.write_text(path.read_text().split("log_every")[0])
    with pytest.raises(ValueError, match=r"config.yaml` was cut off: its last line must be `...`; restore the file"):
        entry.resume(folder, quiet=True)


def test_settings_that_are_not_text(density_run, tmp_path):
    folder = shutil.copytree(density_run, tmp_path / "run")
    (folder / "config.yaml").write_bytes(b"data: caf\xe9\n...\n")
    with pytest.raises(ValueError, match="is not text in UTF-8, at byte 9"):
        entry.resume(folder, quiet=True)


def test_a_damaged_record_stops_a_resumed_run_in_one_line(density_run, tmp_path):
    folder = shutil.copytree(density_run, tmp_path / "run")
    (folder / "data.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"data.json` is damaged: .*; restore the file"):
        entry.resume(folder, quiet=True)
