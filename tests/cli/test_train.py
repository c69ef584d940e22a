import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from revnet.cli._photos import photo_settings
from revnet.training import TrainConfig, load_classifier
from revnet.training.recipes import find_recipe
from tests.training.samples import TINY, write_image_folder, write_images


def test_summary_shows_accuracy_time_memory_and_paths(revnet, tmp_path):
    folder = tmp_path / "run"
    code, output, errors = revnet("train", "--epochs", 2, "--batch-size", 400, "--out-dir", folder)
    assert (code, errors) == (0, "")
    summary = output.partition("\n\n")[2].splitlines()
    starts = [line.partition("  ")[0] for line in summary]
    assert starts == ["test accuracy", "", "step time", "activation memory", "", "weights", "", "log", "picture"]
    assert "(error " in summary[0]
    assert "of 360 wrong), last weights" in summary[0]
    assert "best on validation (epoch " in summary[1]
    assert re.fullmatch(r"step time +[\d.]+ (ms|s), median of updates of 400 images", summary[2])
    assert "MiB at the peak of a step of 400 images, reversible" in summary[3]
    assert "MiB for the stored twin, " in summary[4]
    for line in summary[5:]:
        path = line.split("  ")[-1].strip().partition(" (epoch")[0]
        assert path.startswith(str(folder))
        assert Path(path).stat().st_size > 0


def test_flags_take_dashes_or_underscores_and_override_the_file(revnet, tmp_path):
    (tmp_path / "settings.yaml").write_text("epochs: 7\nbatch_size: 1000\nlr: 1e-3\ndecay_at: [0.25]\n")
    arguments = ["--epochs=1", "--config", tmp_path / "settings.yaml", "--weight_decay", "1e-4", "--val-fraction=0.2"]
    code, _, _ = revnet("train", *arguments, "--out_dir", tmp_path / "run")
    assert code == 0
    config = TrainConfig.load(tmp_path / "run" / "config.yaml")
    assert (config.epochs, config.batch_size, config.lr, config.decay_at) == (1, 1000, 0.001, (0.25,))
    assert (config.weight_decay, config.val_fraction) == (1e-4, 0.2)


def test_saved_settings_reproduce_the_run(revnet, run_dir, tmp_path):
    code, _, _ = revnet("train", "--config", run_dir / "config.yaml", "--out-dir", tmp_path / "again")
    assert code == 0
    states = [load_classifier(folder).state_dict() for folder in (run_dir, tmp_path / "again")]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.fixture
def photos(tmp_path):
    """Return a folder of images in two classes."""
    for part in ("train", "val"):
        for index in range(2):
            write_images(tmp_path / "photos" / part / f"class{index}", 4)
    return tmp_path / "photos"


def test_photographs_take_the_recipe_for_photographs(revnet, photos, tmp_path):
    arguments = ["--data", photos, "--image-size", 16, "--epochs", 1, "--batch-size", 4, "--val-fraction", 0]
    arguments += ["--model", "revnet38", "--num-workers", 0, "--num-threads", 1]
    code, output, errors = revnet("train", *arguments, "--out-dir", tmp_path / "run")
    assert (code, errors) == (0, "")
    assert output.startswith("recipe photos/quick/revnet56, for photographs; pass `--config` for another\n")
    config = TrainConfig.load(tmp_path / "run" / "config.yaml")
    recipe = TrainConfig.load(find_recipe("photos/quick/revnet56"))
    assert (config.schedule, config.crop_area) == (recipe.schedule, recipe.crop_area)
    assert config.lr == recipe.lr * config.batch_size / recipe.batch_size
    assert (config.model, config.image_size, config.epochs) == ("revnet38", 16, 1)


def test_an_unknown_user_is_refused(assert_refused):
    assert_refused(["train", "--data", "~unknown_user/photos"], "`--data` (='~unknown_user/photos')")


def test_photo_settings_depend_on_the_data(photos):
    assert photo_settings({}) == photo_settings({"data": "cifar10"}) == {}
    added = photo_settings({"data": str(photos), "lr": 1.0})
    assert added["model"] == "revnet56"
    assert not {"data", "lr"} & added.keys()
    assert photo_settings({"data": str(photos / "train")})["model"] == "revnet56"  # a plain folder of classes
    assert "lr" not in photo_settings({"data": str(photos), "batch_size": 4})
    assert photo_settings({"data": str(photos.parent / "empty")}) == {}
    assert photo_settings({"data": "hub:owner/name"}) == photo_settings({"data": "imagenet"}) != {}


def test_print_config_shows_every_setting(revnet):
    code, output, _ = revnet("train", "--print-config", "--epochs", 3)
    assert code == 0
    assert "epochs: 3\n" in output
    assert "crop_padding: null\n" in output


def test_resume_rejects_settings(revnet, run_dir, assert_refused):
    code, output, _ = revnet("train", "--resume", run_dir)
    assert code == 0
    assert "epochs  1, 3 updates of 400 images" in output
    assert_refused(
        ["train", "--resume", run_dir, "--batch-size", 3],
        "`--batch-size` (=3) cannot change within a run, which has 400; leave it out, or start a new run",
    )


def test_resume_refuses_another_folder(revnet, run_dir, assert_refused, tmp_path, monkeypatch):
    monkeypatch.chdir(run_dir.parent)
    assert_refused(
        ["train", "--resume", run_dir, "--out-dir", tmp_path / "other"],
        f"`--out-dir` (='{tmp_path}/other') cannot change within a run, which is in '{run_dir}'; leave it out, or",
    )
    assert not (tmp_path / "other").exists()
    for same in (run_dir, "finished/"):
        assert revnet("train", "--resume", run_dir, "--out-dir", same)[::2] == (0, "")


def test_resume_auto_expands_the_home_folder(revnet, run_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(run_dir.parent))
    command = ["train", "--batch-size", 400, "--epochs", 1, "--resume", "auto", "--out-dir", "~/finished"]
    code, output, errors = revnet(*command)
    assert (code, errors) == (0, "")
    assert "epoch 1/1" not in output, "the run is over"


def test_resume_auto_starts_a_run_and_continues_it(revnet, assert_refused, tmp_path):
    command = ["train", "--resume", "auto", "--batch-size", 1000, "--epochs", 1, "--out-dir", tmp_path / "run"]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)  # all that a run leaves that is killed at its start
    code, output, errors = revnet(*command)
    assert (code, errors) == (0, "")
    assert "epoch 1/1" in output
    code, output, errors = revnet(*command)
    assert (code, errors) == (0, "")
    assert "epoch 1/1" not in output, "the run is over"
    code, output, _ = revnet(*command[:5], "--epochs", 2, *command[7:])
    assert code == 0
    assert output.startswith("changed  epochs 1 -> 2\n")
    assert "epoch 1/2" not in output
    assert "epoch 2/2" in output
    assert_refused([*command, "--seed", 1], "`--seed` (=1) cannot change within a run, which has 0")
    assert_refused(command[:3], "`--resume auto` needs a folder; pass `--out-dir FOLDER`")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--save-every", "0"],
            "`--save-every` (='0') must be above 0; pass a number of updates, such as 500, or a time",
        ),
        (["--save-every", "10 apples"], "`--save-every` (='10 apples') must be a number of updates, such as 500, or a"),
        (["--keep-checkpoints", "0"], "`--keep-checkpoints` (=0) must be 1 or more"),
        (["--epochs", "0"], "`--epochs` (=0) must be 1 or more"),
        (["--epochs", "1.5"], "`--epochs` (=1.5) must be an integer"),
        (["--epochs", "-1"], "`--epochs` (=-1) must be 1 or more"),
        (["--epochs"], "`--epochs` needs a value"),
        (["--epoch", "3"], "unknown option `--epoch`; did you mean `--epochs`?"),
        (["--zzz", "3"], "unknown option `--zzz`; `revnet train --help` lists them all"),
        (["digits"], "`digits` needs an option before it; `revnet train --help` lists them all"),
        (["--lr", "nan"], "`--lr` (=nan) must be a number"),
        (["--lr", "-1"], "`--lr` (=-1.0) must be a finite number above 0"),
        (["--horizontal-flip", "maybe"], "`--horizontal-flip` (=maybe) must be true or false or null"),
        (["--decay-at", "0.5"], "`--decay-at` (=0.5) must be a list in brackets"),
        (["--precision", "16"], "`--precision` (=16) must be `32-true` or `bf16-mixed`"),
        (["--memory-budget", "16 apples"], "`--memory-budget` (='16 apples') must be a number of bytes with a unit"),
        (["--memory-budget", "1GiB", "--policy", "checkpoint"], "`--policy` (='checkpoint') does not go with a"),
        (["--batch-size", "5000"], "`--batch-size` (=5000) must not exceed the 1,293 training images"),
        (["--model", "revnet83"], "did you mean 'revnet38'?"),
        (["--data", "no/such/folder"], "does not exist"),
        (["--resume", "no/such/run"], "`no/such/run` does not exist"),
        (["--config", "no.yaml"], "`--config` (no.yaml): file does not exist; pass a YAML file"),
        (["--config", "."], "`--config` (.): path is not a file"),
    ],
)
def test_usage_errors_print_one_line(assert_refused, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert_refused(["train", *arguments], message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3\nepoch: 4\n", "`--config` (bad.yaml) has the unknown setting `epoch`; did you mean `--epochs`?"),
        ("epochs: many\n", "`--epochs` (=many) must be an integer"),
        (
            "epochs: 3\nlr: 0.1\nepochs: 4\n",
            "`--config` (bad.yaml) has `epochs:` twice, the second time in line 3; remove one of them.",
        ),
        ("epochs: [3\n", "`--config` (bad.yaml) is not valid YAML: "),
        ("- epochs\n", "`--config` (bad.yaml) must hold one `setting: value` per line"),
        ("", "`--config` (bad.yaml) must hold one `setting: value` per line"),
    ],
)
def test_errors_in_a_config_print_one_line(assert_refused, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    assert_refused(["train", "--config", "bad.yaml"], message)


def test_rejects_a_binary_config(assert_refused, run_dir):
    assert_refused(
        ["train", "--config", run_dir / "last.safetensors"],
        "last.safetensors) cannot be read: File of more than 256 KiB",
    )


def test_rejects_a_folder_that_holds_a_run(assert_refused, run_dir):
    assert_refused(["train", "--out-dir", run_dir], "is not empty; pass a new folder, or continue the run in it with")


def start(*arguments, **options):
    command = [sys.executable, "-m", "revnet.cli.main", "train", *map(str, arguments)]
    # A shell's background job ignores Ctrl-C, and its children with it: ask for the usual answer.
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=restore, **options
    )


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),  # tests/training/test_kills.py sends more of them
        # Within one process, tests/training/test_run.py sends these two.
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
    ],
    ids=lambda number: number.name,
)
def test_resumes_a_stopped_process(revnet, tmp_path, number):
    folder = tmp_path / "run"
    process = start("--model", TINY, "--epochs", 1000, "--out-dir", folder)
    while "epoch    2/1000" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate()
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        assert re.fullmatch(
            rf"\nrevnet train: stopped; `revnet train --resume {folder}` continues after update \d+\.\n", errors
        )
    code, output, errors = revnet("train", "--resume", folder, "--epochs", 4)
    assert (code, errors) == (0, "")
    assert output.startswith("changed  epochs 1000 -> 4\n")
    assert "epoch 4/4" in output
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_signal_to_all_processes_of_a_job_saves_first(tmp_path):
    data = write_image_folder(tmp_path / "data", num_images=40)
    folder = tmp_path / "run"
    arguments = ["--data", data, "--image-size", 16, "--batch-size", 4, "--epochs", 100, "--num-workers", 2]
    process = start(*arguments, "--save-every", 3, "--out-dir", folder, start_new_session=True)
    while not list(folder.glob("checkpoints/*.ckpt")):
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped; `revnet train --resume" in errors
    assert errors.count("\n") == 2, "workers print nothing"


@pytest.mark.slow
def test_the_default_run_learns_the_digits(revnet, tmp_path):
    code, output, _ = revnet("train", "--out-dir", tmp_path / "run")
    assert code == 0
    accuracy = float(output.partition("test accuracy  ")[2].partition(" %")[0])
    assert accuracy >= 98
