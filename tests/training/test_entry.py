import json
import shutil
from statistics import median

import matplotlib.image
import pytest
import torch
from lightning.pytorch import Callback

from revnet.data import load_dataset
from revnet.errors import CheckpointError, DataError
from revnet.memory import measure
from revnet.models import create_model
from revnet.nn import Store
from revnet.training import TrainConfig, evaluate, load_classifier, resume, train
from tests.training.samples import RUN_FILES, TINY, assert_same_run, newest_checkpoint, read_log, train_and_resume


def test_run_writes_its_files(finished):
    assert sorted(path.name for path in finished.folder.iterdir()) == RUN_FILES


def test_saves_the_resolved_settings(finished):
    config = TrainConfig.load(finished.folder / "config.yaml")
    assert (config.epochs, config.crop_padding, config.horizontal_flip, config.num_threads) == (2, 1, False, 1)


def test_log_has_a_row_per_epoch(finished):
    rows = read_log(finished.folder)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [row["updates"] for row in rows] == ["12", "24"]
    assert [float(row["lr"]) for row in rows] == [0.1, pytest.approx(0.01)]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert {"train_accuracy", "val_loss", "val_accuracy", "step_seconds"} <= rows[0].keys()


def test_summary_repeats_the_result(finished):
    summary = json.loads((finished.folder / "summary.json").read_text())
    assert summary["test_error"] == finished.test.error
    assert summary["test_images"] == 360
    assert summary["peak_bytes"] == finished.peak_bytes
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["num_updates"] == finished.num_updates == 24
    rows = read_log(finished.folder)
    assert summary["train_seconds"] == pytest.approx(sum(float(row["epoch_seconds"]) for row in rows))
    assert summary["step_seconds"] == pytest.approx(median(float(row["step_seconds"]) for row in rows))
    assert summary["process_peak_bytes"] > 2**26, "PyTorch alone takes more"
    assert summary["machine"][0].startswith("- Hardware: ")


def test_learning_curve_is_an_image(finished):
    height, width, _ = matplotlib.image.imread(finished.folder / "learning_curve.png").shape
    assert (height, width) == (540, 1350)


def test_memory_equals_measured_model_and_stored_twin(finished):
    batch = load_classifier(finished.folder).preprocess(load_dataset("digits").train.images[:100])
    expected = []
    for options in ({}, {"policy": Store()}):
        model = create_model("revnet38", in_channels=1, **options).to(memory_format=torch.channels_last)
        expected.append(measure(model.train(), batch).activation_bytes)
    assert [finished.peak_bytes, finished.stored_peak_bytes] == expected
    assert finished.peak_bytes < finished.stored_peak_bytes


def test_evaluates_last_and_best_weights(finished):
    assert evaluate(finished.folder / "last.safetensors") == finished.test
    assert evaluate(finished.folder / "best.safetensors") == finished.best_test


@pytest.mark.slow  # tests/training/run resumes smaller runs.
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"schedule": "cosine", "warmup": 0.3, "nesterov": True, "cutout": 3, "start_size": 4},
        {"memory_budget": "20MiB", "optimizer": "adamw", "lr": 1e-3},
    ],
    ids=["", "modern", "planned-adamw"],
)
def test_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch, more):
    # crops and flips draw from the random state; schedule, momentum and batch norm have their own state
    settings = {"epochs": 4, "crop_padding": 1, "horizontal_flip": True, "batch_size": 200} | more
    straight, resumed = train_and_resume(TrainConfig(**settings), tmp_path, monkeypatch, stop_after=2)

    assert_same_run(straight, resumed)
    assert (resumed.test, resumed.best_epoch) == (straight.test, straight.best_epoch)


def test_resuming_a_finished_run_gives_the_same_result(finished):
    assert resume(finished.folder, quiet=True) == finished


def test_resume_rejects_a_checkpoint_of_another_model(finished, tmp_path):
    folder = tmp_path / "mixed"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(newest_checkpoint(finished.folder), folder / "checkpoints")
    TrainConfig(model="resnet32").resolve("digits").save(folder / "config.yaml")
    with pytest.raises(CheckpointError, match=r"update-00000024\.ckpt` does not fit the model resnet32"):
        resume(folder)


def test_resume_rejects_a_folder_without_a_run(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere` does not exist; pass the folder of a run"):
        resume(tmp_path / "nowhere")


def test_trains_on_all_images_without_validation(out_dir):
    result = train(TrainConfig(epochs=1, val_fraction=0, preprocess="mean_image", out_dir=out_dir), quiet=True)
    assert (result.best_epoch, result.best_val_accuracy, result.best_test) == (1, None, None)
    assert evaluate(result.folder / "best.safetensors") == result.test
    (row,) = read_log(result.folder)
    assert int(row["updates"]) == 1437 // 100
    assert "val_loss" not in row


def test_stored_model_reports_one_memory_figure(out_dir):
    result = train(TrainConfig(model="resnet32", epochs=1, batch_size=400, out_dir=out_dir), quiet=True)
    assert result.stored_peak_bytes is None
    assert ", stored" in result.report()


@pytest.mark.parametrize("max_updates", [1, 2, 3, 4])
def test_run_ends_after_max_updates(out_dir, max_updates):
    result = train(TrainConfig(model=TINY, batch_size=400, max_updates=max_updates, out_dir=out_dir), quiet=True)
    rows = read_log(result.folder)
    assert result.num_updates == max_updates
    assert [int(row["updates"]) for row in rows] == {1: [1], 2: [2], 3: [3], 4: [3, 4]}[max_updates]
    assert all(row["val_accuracy"] for row in rows), "a shortened epoch is validated too"
    assert result.best_val_accuracy is not None


def test_stored_twin_learns_the_same(tmp_path):
    results = {}
    for name, policy, lr in (("reverse", "reverse", 0.01), ("store", "store", 0.01), ("start", "store", 1e-9)):
        # One update only: so early and at this learning rate, each update amplifies rounding thirtyfold. The first
        # gradients already differ by 2e-3; plain autograd's differ from float64's by 1e-2
        # (`revnet figure gradient-angle`).
        config = TrainConfig(max_updates=1, batch_size=400, lr=lr, policy=policy, out_dir=str(tmp_path / name))
        results[name] = train(config, quiet=True)
    assert results["store"].peak_bytes == results["reverse"].stored_peak_bytes > results["reverse"].peak_bytes
    assert results["store"].stored_peak_bytes is None
    reverse, store, start = (
        torch.cat([weight.flatten() for weight in load_classifier(result.folder).parameters() if weight.ndim == 4])
        for result in results.values()
    )
    assert (reverse - store).norm() < 0.3 * (store - start).norm()


def test_rejects_the_store_policy_for_a_model_that_stores(out_dir):
    with pytest.raises(ValueError, match=r"`policy` \(='store'\) is for reversible models; resnet32 stores"):
        train(TrainConfig(model="resnet32", policy="store", out_dir=out_dir), quiet=True)


def test_run_calls_additional_callbacks(out_dir):
    class Count(Callback):
        batches = 0

        def on_train_batch_end(self, *args):
            self.batches += 1

    count = Count()
    train(TrainConfig(model=TINY, epochs=1, batch_size=400, out_dir=out_dir), quiet=True, callbacks=[count])
    assert count.batches == 3


def test_trains_with_autocast(out_dir):
    result = train(TrainConfig(epochs=1, precision="bf16-mixed", batch_size=400, out_dir=out_dir), quiet=True)
    state = load_classifier(result.folder).state_dict()
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in state.values())


def test_restores_the_number_of_threads(out_dir):
    torch.set_num_threads(2)
    train(TrainConfig(model=TINY, epochs=1, batch_size=1000, num_threads=1, out_dir=out_dir), quiet=True)
    assert torch.get_num_threads() == 2


def test_numbers_runs_and_never_overwrites_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits_revnet38_1").mkdir(parents=True)
    result = train(TrainConfig(epochs=1, batch_size=1000), quiet=True)
    assert str(result.folder) == "runs/digits_revnet38_2"
    assert not any((tmp_path / "runs" / "digits_revnet38_1").iterdir())


def test_rejects_a_folder_that_is_not_empty(finished):
    before = {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"`out_dir` \(='.*finished'\) is not empty; pass a new folder, or continue"):
        train(TrainConfig(epochs=1, out_dir=str(finished.folder)))
    assert {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()} == before


def test_rejects_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError, match=r"`out_dir` \(='.*file/run'\) cannot be written: Not a directory; pass a folder"
    ):
        train(TrainConfig(epochs=1, out_dir=str(tmp_path / "file" / "run")))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"model": "revnet83"}, ValueError, "did you mean 'revnet38'"),
        ({"data": "digit"}, ValueError, "did you mean 'digits'"),
        ({"data": "no/such/folder"}, DataError, "does not exist"),
        ({"batch_size": 1294}, ValueError, r"`batch_size` \(=1294\) must not exceed the 1,293 training images"),
        pytest.param(
            {"device": "cuda"},
            ValueError,
            r"`device` \(='cuda'\) is not available",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_rejects_invalid_settings_before_writing(tmp_path, monkeypatch, settings, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        train(TrainConfig(epochs=1, **settings))
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::revnet.ReconstructionWarning")  # correct: the streams are near 1e15 by then
def test_diverging_run_stops_with_advice_and_saves_nothing(out_dir, tmp_path):
    with pytest.raises(
        ValueError, match=r"`lr` \(=1e\+12\) made the training loss (nan|inf) in epoch 1; pass a smaller"
    ):
        train(TrainConfig(epochs=1, lr=1e12, out_dir=out_dir), quiet=True)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "config.yaml",
        "data.json",
        "updates.csv",
    ]
    assert not list((tmp_path / "run").glob("checkpoints/*.ckpt"))
