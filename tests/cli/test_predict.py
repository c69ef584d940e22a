import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.training.samples import make_header, save_checkpoint, write_images


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the working folder, which holds a run and two images."""
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "run" / "last.safetensors", make_header())
    write_images(tmp_path, 2)
    return tmp_path


def test_one_line_per_image(revnet, folder):
    code, output, errors = revnet("predict", "run", "0_0.png", "./0_1.png", folder / "0_0.png")
    assert (code, errors) == (0, "weights: run/last.safetensors\n")
    lines = output.splitlines()
    assert [line.split()[0] for line in lines] == ["0_0.png", "0_1.png", str(folder / "0_0.png")]
    for line in lines:
        _, *answers = line.split("  ")
        answers = [answer.strip() for answer in answers if answer]
        assert {answer.split()[0] for answer in answers} == {"cat", "dog", "frog"}
        assert sum(float(answer.split()[1]) for answer in answers) == pytest.approx(100, abs=0.02)
    assert lines[0].split()[1:] == lines[2].split()[1:]


def test_options_before_or_after_the_images(revnet, folder):
    expected = revnet("predict", "run", "0_0.png", "0_1.png", "--top", 1)
    assert expected[0] == 0
    assert all(len(line.split()) == 4 for line in expected[1].splitlines())  # file, class, number, %
    assert revnet("predict", "run", "--top=1", "--device", "cpu", "0_0.png", "0_1.png") == expected
    assert revnet("predict", "--top", 1, "run", "0_0.png", "0_1.png") == expected


def test_file_names_are_not_parsed_as_yaml(revnet, folder):
    names = ["null", "1.0", "[a]", "a: b", "été.png", "-x.png"]
    for name in names:
        (folder / "0_0.png").with_name(name).write_bytes((folder / "0_0.png").read_bytes())
    code, output, _ = revnet("predict", "run", "--top", 1, "--", *names)
    assert code == 0
    assert [line.partition("  ")[0].strip() for line in output.splitlines()] == names


def test_file_name_that_is_not_utf8(revnet, folder):
    name = os.fsdecode(b"caf\xe9.png")
    (folder / name).write_bytes((folder / "0_0.png").read_bytes())
    code, output, _ = revnet("predict", "run", name, "0_1.png", "--top", 1, "--csv", "answers.csv")
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()] == ["caf?.png", "0_1.png"]
    assert b"\ncaf\\udce9.png,1," in (folder / "answers.csv").read_bytes()


def test_writes_a_csv(revnet, folder):
    code, output, _ = revnet("predict", "run", "0_0.png", "0_1.png", "--csv", "answers.csv", "--top", 2)
    assert code == 0
    with (folder / "answers.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["file"], row["rank"]) for row in rows] == [
        *(("0_0.png", "1"), ("0_0.png", "2"), ("0_1.png", "1"), ("0_1.png", "2"))
    ]
    assert output.split()[1] == rows[0]["class"]


def test_folders_and_patterns(revnet, folder):
    for name in ("photos/b/2.PNG", "photos/b/1.png", "photos/a 1.png", "photos/[x].png", "photos/.hidden.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((folder / "0_0.png").read_bytes())
    (folder / "photos" / "Thumbs.db").write_bytes(b"")

    def files(*arguments):
        code, output, errors = revnet("predict", "run", *arguments, "--top", 1)
        assert code == 0, errors
        return [line.partition("  ")[0] for line in output.splitlines()]

    everything = ["photos/[x].png", "photos/a 1.png", "photos/b/1.png", "photos/b/2.PNG"]
    assert files("photos") == files("photos/") == everything
    assert files("photos/**/*.png", "0_0.png") == [*everything[:3], "0_0.png"]
    assert files("ph*") == everything
    assert files("photos/[x].png") == ["photos/[x].png"]  # a file of that name
    assert files("photos/[a]*") == ["photos/a 1.png"]
    assert files(folder / "0_*.png") == [str(folder / "0_0.png"), str(folder / "0_1.png")]


def test_a_pattern_without_a_match(revnet, folder):
    code, output, errors = revnet("predict", "run", "*.gif", "0_0.png", "--top", 1)
    assert (code, len(output.splitlines())) == (1, 1)
    assert "revnet predict: error: '*.gif' matches no files; check the pattern." in errors.splitlines()


def test_writes_json_lines(revnet, folder):
    names = ["Übung 1.png", os.fsdecode(b"caf\xe9.png"), "new\nline.png"]
    for name in names:
        (folder / name).write_bytes((folder / "0_0.png").read_bytes())
    code, output, errors = revnet("predict", "run", *names, "--top", 2, "--jsonl", "answers.jsonl")
    assert code == 0, errors
    assert [line.partition("  ")[0].strip() for line in output.splitlines()] == [
        *("Übung 1.png", "caf?.png", r"new\nline.png")
    ]
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["file"] for row in rows] == names
    assert "Übung" in lines[0]
    for row in rows:
        assert [set(answer) for answer in row["answers"]] == [{"class", "probability"}] * 2
        assert row["answers"][0]["probability"] >= row["answers"][1]["probability"]


def test_unreadable_images_do_not_stop_the_others(revnet, folder):
    (folder / "text.png").write_text("not an image")
    (folder / "empty").mkdir()
    code, output, errors = revnet("predict", "run", "text.png", "0_0.png", "gone.png", "empty", "--csv", "answers.csv")
    assert code == 1
    assert [line.split()[0] for line in output.splitlines()] == ["0_0.png"]
    assert errors.splitlines() == [
        "revnet predict: error: 'text.png' cannot be decoded: it is not an image; pass the path of an image.",
        "weights: run/last.safetensors",
        "revnet predict: error: 'gone.png' cannot be decoded: no such file or directory; pass the path of an image.",
        "revnet predict: error: 'empty' holds no images (.jpg, .jpeg, .png, .bmp, .webp, .gif, .tif, .tiff, .ppm, "
        ".pgm, .pbm); pass a folder that does.",
    ]
    assert len((folder / "answers.csv").read_text().splitlines()) == 1 + 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`CHECKPOINT` and `IMAGES` are missing; `revnet predict --help` explains it."),
        (["run"], "`IMAGES` is missing; `revnet predict --help` explains it."),
        (["no/such/run", "0_0.png"], "`no/such/run` does not exist; pass a `.safetensors` or `.ckpt` file"),
        (
            ["run", "0_0.png", "--top", "1", "0_1.png", "b c.png"],
            "`0_1.png b c.png` is separated from the other IMAGES; write them one after the other.",
        ),
        (["run", "0_0.png", "-t", "1"], "unknown option `-t`; did you mean `--top`?"),
        (["run", "--images", "0_0.png"], "unknown option `--images`; `revnet predict --help` lists them all"),
        (["run", "0_0.png", "--top", "0"], "`--top` (=0) must be 1 or more"),
        (["run", "0_0.png", "--top", "many"], "`--top` (=many) must be an integer"),
        (["run", "0_0.png", "--device", "abacus"], "`--device` (='abacus') is not a device"),
        (["run", "0_1.png", "--csv", "0_0.png"], "`--csv` (=0_0.png) is the name of an image or of weights, which the"),
        (
            ["run", "0_1.png", "--jsonl", "run/last.safetensors"],
            "(=run/last.safetensors) is the name of an image or",
        ),
        (["run", "0_0.png", "--csv", "a", "--jsonl", "a"], "`--csv` and `--jsonl` (=a) name the same file"),
        (["run", "0_0.png", "--csv", "no/such/folder.csv"], "`--csv` (=no/such/folder.csv) must be a file in a folder"),
        (["run", "0_0.png", "--jsonl", "."], "`--jsonl` (=.) must be a file in a folder that exists"),
        (["run", "0_0.png", "--csv", "."], "`--csv` (=.) must be a file in a folder that exists"),
    ],
)
def test_usage_errors_print_one_line(assert_refused, folder, arguments, message):
    assert_refused(["predict", *arguments], message)


@pytest.mark.parametrize("arguments", [["--help"], ["run"], ["run", "a.png", "--csv", "no/such/folder.csv"]])
def test_torch_is_not_loaded_for_help_or_wrong_flags(arguments):
    code = f"import sys; from revnet.cli.main import main; main({['predict', *arguments]}); "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, check=True)


def test_help_shows_several_images(revnet):
    code, output, _ = revnet("predict", "--help")
    assert code == 0
    assert output.startswith("usage: revnet predict CHECKPOINT IMAGES... [options]\n")


def test_weights_and_a_sample_of_the_package(revnet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output, errors = revnet("predict", "revnet38.digits", "sample", "--top", 1)
    assert (code, errors) == (0, "weights: revnet38.digits, from the package\n")
    path, answer, percent, _ = output.split()
    assert path.endswith("sample.png")
    assert (answer, float(percent) > 90) == ("7", True)
    (tmp_path / "sample").mkdir()  # A path of one's own comes first.
    assert revnet("predict", "revnet38.digits", "sample")[0] != 0


RUN_FILES = ["config.yaml", "data.json", "metrics.csv", "updates.csv", "summary.json", "drift.csv"]


@pytest.mark.parametrize("flag", ["--csv", "--jsonl"])
@pytest.mark.parametrize("name", RUN_FILES)
def test_replaces_no_file_of_a_run(assert_refused, folder, flag, name):
    (folder / "run" / "config.yaml").write_text("epochs: 1\n")
    assert_refused(
        ["predict", "run", "0_0.png", flag, f"run/{name}"],
        f"`{flag}` (=run/{name}) is a file of the run in its folder; pass another name.",
    )
    assert (folder / "run" / "config.yaml").read_text() == "epochs: 1\n"


def test_replaces_only_its_own_tables(revnet, assert_refused, folder):
    (folder / "notes.txt").write_text("file,rank\n")
    (folder / "empty.txt").touch()
    for flag in ("--csv", "--jsonl"):
        assert_refused(
            ["predict", "run", "0_0.png", flag, "notes.txt"],
            f"`{flag}` (=notes.txt) exists, and this command did not write it; pass another name, or delete the file.",
        )
    assert (folder / "notes.txt").read_text() == "file,rank\n"
    for name in ("own.csv", "own.csv", "empty.txt"):
        assert revnet("predict", "run", "0_0.png", "--csv", name)[0] == 0
    for _ in range(2):
        assert revnet("predict", "run", "0_0.png", "--jsonl", "own.jsonl")[0] == 0
    assert_refused(["predict", "run", "0_0.png", "--jsonl", "own.csv"], "`--jsonl` (=own.csv) exists, and this command")


@pytest.mark.parametrize("flag", ["--csv", "--jsonl"])
def test_full_disk_names_the_option(revnet, folder, full_disk, flag):
    code, _, errors = revnet("predict", "run", "0_0.png", flag, "answers")
    assert code == 2
    assert errors.splitlines()[-1] == (
        f"revnet predict: error: `{flag}` (='answers') cannot be written: No space left on device; pass a file that "
        "you can write to."
    )
