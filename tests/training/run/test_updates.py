import json

import pytest
import torch
from lightning.pytorch import Callback

from revnet.training import LanguageConfig, TrainConfig, load_language_model, train
from tests.training.samples import TINY, read_log, write_text


@pytest.fixture
def language(tmp_path):
    """Settings of a network without batch norm and dropout, and plain gradient descent."""
    sizes = {"length": 16, "depth": 2, "dim": 16, "num_heads": 2, "batch_size": 8, "val_windows": 4}
    return {"data": write_text(tmp_path), "optimizer": "sgd", "lr": 0.1, "updates_per_epoch": 4, **sizes}


def weights_of(result):
    return torch.cat([parameter.detach().flatten() for parameter in load_language_model(result.folder).parameters()])


def test_parts_of_a_batch_make_the_same_update(language, tmp_path):
    runs = {
        name: train(LanguageConfig(**language | more, epochs=1, out_dir=str(tmp_path / name)), quiet=True)
        for name, more in {"whole": {}, "parts": {"accumulate": 4}, "half": {"batch_size": 4}}.items()
    }
    whole, parts, half = (weights_of(run) for run in runs.values())
    # Against another batch size: the sums are the same up to the order of additions.
    assert (parts - whole).norm() < 1e-4 * (half - whole).norm()
    assert [run.num_updates for run in runs.values()] == [4, 4, 4]
    assert runs["parts"].batch_size == 8
    assert runs["parts"].peak_bytes < runs["whole"].peak_bytes / 3
    assert "at the peak of a step of 8 windows, in 4 parts" in runs["parts"].report()
    rows = [read_log(run.folder)[0] for run in runs.values()]
    assert rows[0]["updates"] == rows[1]["updates"] == "4"
    assert float(rows[1]["train_loss"]) == pytest.approx(float(rows[0]["train_loss"]), rel=1e-5)


class Gradients(Callback):
    def __init__(self):
        self.largest, self.norms = [], []

    def on_before_zero_grad(self, trainer, module, optimizer):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if gradients:
            self.largest.append(max(float(gradient.abs().max()) for gradient in gradients))
            self.norms.append(float(torch.cat([gradient.flatten() for gradient in gradients]).norm()))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clips_by_value_or_norm(language, tmp_path, accumulate):
    figures = {}
    for name, value in (("max_grad_value", 1e-3), ("max_grad_norm", 1e-2)):
        watch = Gradients()
        settings = language | {"max_grad_norm": None, name: value, "accumulate": accumulate}
        config = LanguageConfig(**settings, max_updates=2, out_dir=str(tmp_path / name))
        train(config, quiet=True, callbacks=[watch])
        figures[name] = watch
    assert max(figures["max_grad_value"].largest) == pytest.approx(1e-3)
    assert max(figures["max_grad_norm"].norms) == pytest.approx(1e-2, rel=1e-3)


def test_validates_every_n_updates_and_saves_the_best(language, out_dir):
    class Validations(Callback):
        def __init__(self):
            self.updates, self.losses = [], []

        def on_validation_end(self, trainer, module):
            self.updates.append(trainer.global_step)
            self.losses.append(float(trainer.callback_metrics["val_loss"]))

    watch = Validations()
    config = LanguageConfig(**language, epochs=2, max_updates=7, val_every=3, accumulate=2, out_dir=out_dir)
    result = train(config, quiet=True, callbacks=[watch])
    assert watch.updates == [3, 6, 7]
    assert result.best_val_loss == min(watch.losses)
    assert result.val_loss == watch.losses[-1]


def test_patience_ends_the_run(language, out_dir):
    config = LanguageConfig(**language | {"lr": 1e-12}, epochs=9, val_every=1, patience=2, out_dir=out_dir)
    result = train(config, quiet=True)
    assert result.num_updates < 36
    assert json.loads((result.folder / "summary.json").read_text())["num_updates"] == result.num_updates


def test_plateau_lowers_the_rate_after_validations(language, out_dir):
    settings = language | {"lr": 1e-12, "schedule": "plateau", "plateau_patience": 1, "decay_factor": 0.5}
    result = train(LanguageConfig(**settings, epochs=6, out_dir=out_dir), quiet=True)
    rates = [float(row["lr"]) for row in read_log(result.folder)]
    assert rates == pytest.approx([1e-12, 1e-12, 1e-12, 0.5e-12, 0.5e-12, 0.25e-12])


def test_profile_writes_a_trace_and_prints_operators(language, out_dir, capfd):
    result = train(LanguageConfig(**language, max_updates=3, profile=True, out_dir=out_dir))
    trace = json.loads((result.folder / "profile.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])
    output = capfd.readouterr().out
    assert f"3 updates in {result.folder / 'profile.json'}; the operators that take the longest:" in output
    assert "operator" in output
    assert "aten::" in output


def test_deterministic_algorithms_are_used_within_the_run_only(language, out_dir):
    class Flag(Callback):
        is_on = False

        def on_train_batch_end(self, *args):
            self.is_on = torch.are_deterministic_algorithms_enabled()

    flag = Flag()
    train(LanguageConfig(**language, max_updates=1, deterministic=True, out_dir=out_dir), quiet=True, callbacks=[flag])
    assert flag.is_on
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # PyTorch's own, in torch.compile
@pytest.mark.slow
def test_compiled_run_learns_the_same(language, tmp_path):
    runs = [
        train(LanguageConfig(**language, max_updates=2, compile=flag, out_dir=str(tmp_path / flag)), quiet=True)
        for flag in ("off", "functions", "model")
    ]
    plain, *others = (weights_of(run) for run in runs)
    for compiled in others:
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def test_bfloat16_parameters_keep_streams_in_float32(out_dir, recwarn):
    class Types(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            model = module.classifier.model
            self.types = {name: parameter.dtype for name, parameter in model.named_parameters()}

    watch = Types()
    config = TrainConfig(model=TINY, max_updates=2, batch_size=50, precision="bf16-true", out_dir=out_dir)
    train(config, quiet=True, callbacks=[watch])
    assert {watch.types["stem.0.weight"], watch.types["head.bias"]} == {torch.bfloat16}
    assert watch.types["stem.1.weight"] == torch.float32
    assert not [warning for warning in recwarn if "ReconstructionWarning" in str(warning.category)]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_step_in_the_backward_pass_makes_the_same_update(language, tmp_path, optimizer):
    settings = language | {"optimizer": optimizer, "lr": 1e-2, "max_grad_norm": None, "max_grad_value": 1e-3}
    runs = [
        train(
            LanguageConfig(**settings, max_updates=3, step_in_backward=flag, out_dir=str(tmp_path / str(flag))),
            quiet=True,
        )
        for flag in (False, True)
    ]
    assert torch.equal(*map(weights_of, runs))
