"""What a resumed run may change, and what it refuses: settings, data, a run that is going on."""

import shutil
from dataclasses import replace

import pytest
import torch

from revnet.errors import CheckpointError
from revnet.training import (
    LanguageConfig,
    LanguageResult,
    NiceConfig,
    TrainConfig,
    TrainingInterrupted,
    load_language_model,
    resume,
    train,
)
from revnet.training.run.run_lock import lock_run
from tests.training.run.test_stop import SendSignal
from tests.training.samples import assert_same_run, read_log, write_image_folder, write_images

NICE = NiceConfig(batch_size=200, epochs=2, num_couplings=2, hidden_dim=16, num_hidden=1)
LANGUAGE = {"length": 8, "batch_size": 4, "dim": 8, "depth": 1, "num_heads": 1, "epochs": 2, "updates_per_epoch": 2}


@pytest.fixture(scope="module")
def finished_nice(tmp_path_factory):
    return train(replace(NICE, out_dir=str(tmp_path_factory.mktemp("nice") / "run")), quiet=True)


@pytest.fixture
def nice(finished_nice, tmp_path):
    """Return the folder of a finished run that may be changed."""
    return shutil.copytree(finished_nice.folder, tmp_path / "nice")


def stop_after(config, update, folder):
    """Stop a run after an update, and return its folder."""
    with pytest.raises(TrainingInterrupted):
        train(replace(config, out_dir=str(folder)), quiet=True, callbacks=[SendSignal("on_train_batch_end", update)])
    return folder


def test_more_epochs_equal_a_longer_run_with_the_schedule_of_both(nice, capsys):
    result = resume(nice, epochs=3)
    assert capsys.readouterr().out.startswith("changed  epochs 2 -> 3\n")
    assert result.num_updates == 18
    rows = read_log(nice)
    assert [row["updates"] for row in rows] == ["6", "12", "18"]
    # The cosine of three epochs, at its second third.
    assert float(rows[2]["lr"]) == pytest.approx(NICE.lr * 0.25, rel=0.1)
    assert NiceConfig.load(nice / "config.yaml").epochs == 3
    assert resume(nice, quiet=True).num_updates == 18


def test_length_that_is_given_from_the_start_gives_the_same_run(tmp_path):
    straight = train(replace(NICE, epochs=3, warmup=0, out_dir=str(tmp_path / "straight")), quiet=True)
    folder = stop_after(replace(NICE, epochs=2, warmup=0), 1, tmp_path / "stopped")
    # The first update has the full rate in both, so that the schedules agree from there on.
    assert_same_run(straight, resume(folder, epochs=3, quiet=True))


def test_another_rate_applies_to_the_rest_of_the_run(tmp_path, capsys):
    folder = stop_after(NICE, 7, tmp_path / "run")
    resume(folder, lr=NICE.lr / 4)
    assert f"changed  lr {NICE.lr} -> {NICE.lr / 4}\n" in capsys.readouterr().out
    shutil.rmtree(folder)
    folder = stop_after(NICE, 6, folder)
    rows = read_log(resume(folder, lr=NICE.lr / 4, quiet=True).folder)
    assert float(rows[1]["lr"]) == pytest.approx(NICE.lr / 8, rel=0.1)


def test_rate_of_the_settings_holds_if_the_run_stops_before_the_next_checkpoint(tmp_path):
    folder = stop_after(NICE, 6, tmp_path / "run")
    config = NiceConfig.load(folder / "config.yaml")
    replace(config, lr=config.lr / 4).save(folder / "config.yaml")
    assert float(read_log(resume(folder, quiet=True).folder)[1]["lr"]) == pytest.approx(NICE.lr / 8, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 100}, ValueError, r"`batch_size` \(=100\) cannot change within a run, which has 200; leave"),
        ({"num_couplings": 4}, ValueError, r"`num_couplings` \(=4\) cannot change within a run, which has 2"),
        ({"epochs": 1}, ValueError, r"`epochs` \(=1\) leaves 6 updates, and the run has made 12 already; pass more"),
        ({"epochs": 0}, ValueError, r"`epochs` \(=0\) must be 1 or more"),
        ({"max_updates": 5}, ValueError, r"`max_updates` \(=5\) leaves 5 updates, and the run has made 12 already"),
        ({"crop_area": "0.5"}, TypeError, r"`crop_area` is not a setting of the run; `revnet train nice --help` lists"),
        ({"save_every": "soon"}, ValueError, r"`save_every` \(='soon'\) must be a number of updates, such as 500, or"),
        ({"data": "cifar10"}, Exception, r"cifar10"),
    ],
)
def test_refuses_in_one_line_and_changes_nothing(nice, changes, error, message):
    before = {path: path.read_bytes() for path in nice.rglob("*") if path.is_file()}
    with pytest.raises(error, match=message) as caught:
        resume(nice, quiet=True, **changes)
    assert "\n" not in str(caught.value)
    assert {path: path.read_bytes() for path in nice.rglob("*") if path.is_file()} == before


def test_settings_that_are_equal_or_open_are_no_change(nice, capsys):
    resume(nice, batch_size=200, epochs=2, num_threads=None, data="digits")
    assert "changed" not in capsys.readouterr().out


def test_run_that_ended_within_an_epoch_cannot_become_longer(tmp_path):
    result = train(replace(NICE, max_updates=4, out_dir=str(tmp_path / "run")), quiet=True)
    assert resume(result.folder, quiet=True).num_updates == 4
    with pytest.raises(ValueError, match=r"`max_updates` \(=9\) cannot continue the run, whose last epoch was cut sho"):
        resume(result.folder, max_updates=9, quiet=True)
    with pytest.raises(ValueError, match=r"`epochs` \(=1\) cannot continue the run"):
        resume(result.folder, epochs=1, max_updates=1000, quiet=True)


def test_run_that_stopped_within_an_epoch_becomes_longer(tmp_path):
    folder = stop_after(replace(NICE, max_updates=4), 3, tmp_path / "run")
    assert resume(folder, max_updates=9, quiet=True).num_updates == 9
    assert [row["updates"] for row in read_log(folder)] == ["6", "9"]


def test_second_process_cannot_work_on_a_run(nice):
    with lock_run(nice), pytest.raises(CheckpointError, match=r"nice` belongs to a run that is still going on; wait"):
        resume(nice, quiet=True)
    resume(nice, quiet=True)


def test_newest_checkpoint_that_can_be_read_continues(nice, finished_nice, capsys):
    newest = nice / "checkpoints" / "update-00000012.ckpt"
    newest.write_bytes(newest.read_bytes()[:1000])
    (nice / "checkpoints" / "update-00000099.ckpt.tmp").write_bytes(b"half")
    assert_same_run(finished_nice, resume(nice))
    assert capsys.readouterr().out.startswith(f"skipped  {newest}, which cannot be read\n")
    for path in (nice / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"half")
    with pytest.raises(CheckpointError, match=r"^no checkpoint in `.*` can be read, and the newest is update-0+12"):
        resume(nice, quiet=True)


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("is_finished", [True, False])
def test_refuses_a_start_from_the_beginning_that_would_replace_weights(nice, is_finished):
    shutil.rmtree(nice / "checkpoints")
    if not is_finished:
        (nice / "summary.json").unlink()
    before = contents(nice)
    file = "summary.json" if is_finished else "best.safetensors"
    with pytest.raises(
        CheckpointError,
        match=rf"checkpoints` holds no checkpoint, but the run has written `{file}`, which a start from the beginning "
        rf"would replace; restore .* `revnet train nice --config .*config\.yaml --out-dir NEW`\.$",
    ):
        resume(nice, quiet=True)
    assert contents(nice) == before


def test_run_that_was_killed_before_its_first_checkpoint_starts_from_the_beginning(nice, finished_nice):
    for path in [*(nice / "checkpoints").glob("*.ckpt"), nice / "summary.json"]:
        path.unlink()
    log = (nice / "metrics.csv").read_text().splitlines(keepends=True)
    (nice / "metrics.csv").write_text("".join(log[:2]))
    assert_same_run(finished_nice, resume(nice, quiet=True))


def test_refuses_files_in_the_place_of_folders(nice):
    lock = nice / "checkpoints" / "lock"
    lock.unlink()
    lock.mkdir()
    with pytest.raises(CheckpointError, match=r"lock` cannot be opened: Is a directory; remove it\.$"):
        resume(nice, quiet=True)
    shutil.rmtree(nice / "checkpoints")
    (nice / "checkpoints").write_text("")
    with pytest.raises(
        CheckpointError, match=r"checkpoints` must be a folder, but is a file; move it away, and restor"
    ):
        resume(nice, quiet=True)


def test_folder_of_the_run_is_no_change(nice, tmp_path):
    with pytest.raises(
        ValueError, match=r"`out_dir` \(='elsewhere'\) cannot change within a run, which is in '.*nice'"
    ):
        resume(nice, out_dir="elsewhere", quiet=True)
    resume(nice, out_dir=nice, quiet=True)


# ---- data


@pytest.fixture
def images(tmp_path):
    return write_image_folder(tmp_path / "data", num_images=6)


@pytest.fixture
def image_run(tmp_path, images):
    config = TrainConfig(data=str(images), image_size=8, batch_size=4, epochs=2, num_workers=0, val_fraction=0.2)
    return stop_after(config, 1, tmp_path / "run")


def rename_class(images):
    for part in ("train", "val"):
        (images / part / "dog").rename(images / part / "hound")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            lambda images: write_images(images / "train" / "cat", 1, seed=77),
            "the number of training images is 19, and was 18",
        ),
        (rename_class, "the name of class 1 is frog, and was dog"),
        (
            lambda images: next((images / "train" / "dog").iterdir()).write_bytes(b"other"),
            "the files of the training images of class dog differ",
        ),
        (lambda images: shutil.rmtree(images / "val" / "dog"), "the number of test images is 12, and was 18"),
    ],
    ids=["added", "renamed", "changed", "removed"],
)
def test_refuses_other_images_and_names_the_first_difference(image_run, images, change, difference):
    change(images)
    with pytest.raises(
        CheckpointError, match=rf"`data` \(='{images}'\) is not what .*: {difference}; restore"
    ) as caught:
        resume(image_run, quiet=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("val_fraction", "reason"),
    [
        (0.0, r"`batch_size` \(=8\) must not exceed the 6 training images"),
        (0.2, r"`val_fraction` \(=0\.2\) holds out 2 images of 6, fewer than the 3 classes"),
    ],
)
def test_data_that_do_not_suit_the_settings_are_other_data(tmp_path, images, val_fraction, reason):
    config = TrainConfig(data=str(images), image_size=8, batch_size=8, num_workers=0, val_fraction=val_fraction)
    run = stop_after(config, 1, tmp_path / "run")
    few = write_image_folder(tmp_path / "few", num_images=2)
    message = rf"^`data` \(='{few}'\) is not what the run was trained on: {reason}; restore the data, or start a new"
    with pytest.raises(CheckpointError, match=message):
        resume(run, data=str(few), quiet=True)


def test_takes_a_folder_of_images_that_has_moved(image_run, images, tmp_path, capsys):
    moved = images.rename(tmp_path / "moved")
    with pytest.raises(Exception, match="does not exist"):
        resume(image_run, quiet=True)
    assert resume(image_run, data=str(moved)).num_updates > 1
    assert f"changed  data {images} -> {moved}\n" in capsys.readouterr().out
    assert TrainConfig.load(image_run / "config.yaml").data == str(moved)


@pytest.mark.parametrize(
    ("text", "difference"),
    [
        ("ab ab ba bb\n" * 50 + "c", "the character 'c' is new"),
        ("ab ab ba ba\n" * 50, "the text differs"),
        ("aa aa aa aa\n" * 50, "the character 'b' is missing"),
        ("ab ab ba bb\n" * 51, "the number of characters is 612, and was 600"),
    ],
)
def test_refuses_another_text(tmp_path, text, difference):
    path = tmp_path / "text.txt"
    path.write_text("ab ab ba bb\n" * 50)
    folder = stop_after(LanguageConfig(data=str(path), **LANGUAGE), 1, tmp_path / "run")
    path.write_text(text)
    with pytest.raises(CheckpointError, match=rf"is not what the run was trained on: {difference}; restore"):
        resume(folder, quiet=True)
    path.write_text("ab ab ba bb\n" * 50)
    result = resume(folder, quiet=True)
    assert isinstance(result, LanguageResult)
    assert all(torch.isfinite(x).all() for x in load_language_model(folder).state_dict().values())
