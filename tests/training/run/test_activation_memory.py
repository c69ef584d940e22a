from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from safetensors.torch import load_file

from revnet.errors import BudgetError
from revnet.memory import parse_bytes
from revnet.memory.step._live import LiveBytes
from revnet.nn import Checkpoint, Reverse, Store
from revnet.nn._whole_model import policy_holders
from revnet.training import TrainConfig, train
from tests.training.samples import TINY


class WatchUpdates(Callback):
    """Records the policies of the model, and the peak of the bytes alive during each update."""

    def __init__(self):
        self.peaks, self.policies = [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        model = module.classifier.model
        self.policies = [policy for holder in policy_holders(model).values() for policy in holder.policies]
        state = [tensor for moments in trainer.optimizers[0].state.values() for tensor in moments.values()]
        tensors = [*model.parameters(), *model.buffers(), *batch, *state]
        self.constant_bytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors)
        self.live = LiveBytes([*tensors, *module.buffers()])
        self.live.__enter__()

    def on_train_batch_end(self, *args):
        self.live.__exit__(None, None, None)
        self.peaks.append(self.constant_bytes + self.live.peak_bytes)


@pytest.mark.parametrize(
    ("budget", "more", "overestimate"),
    [
        pytest.param("9MiB", {"nesterov": True, "label_smoothing": 0.1}, 0, id="revnet", marks=pytest.mark.slow),
        # Under Lightning, autocast casts weights at each use; PyTorch's default caches the cast weights, at most all.
        pytest.param("9MiB", {"precision": "bf16-mixed"}, 464_890 * 2, id="autocast", marks=pytest.mark.slow),
        pytest.param("20MB", {"model": "resnet32"}, 0, id="resnet"),
        pytest.param("13MiB", {"optimizer": "adamw", "lr": 1e-3}, 0, id="adamw", marks=pytest.mark.slow),
    ],
)
def test_update_needs_the_planned_memory(out_dir, budget, more, overestimate):
    watch = WatchUpdates()
    config = TrainConfig(max_updates=2, batch_size=100, memory_budget=budget, out_dir=out_dir, **more)
    result = train(config, quiet=True, callbacks=[watch])
    assert result.memory_budget_bytes == parse_bytes(budget) >= result.planned_peak_bytes > result.peak_bytes
    # Later updates have the momentum; the plan does not know the labels, nor Lightning's sums for the log.
    assert -overestimate <= watch.peaks[1] - result.planned_peak_bytes <= 100 * 8 + 100
    assert len(set(watch.policies)) > 1, "the plan mixes policies"


def test_run_reports_its_plan(out_dir, capsys):
    result = train(TrainConfig(model=TINY, max_updates=1, memory_budget="1.2MiB", out_dir=out_dir))
    assert "memory  peak 1.1 MiB of 1.2 MiB, step time 1." in capsys.readouterr().out
    plan = (result.folder / "plan.txt").read_text()
    assert plan.startswith("budget     1.2 MiB\npeak       1.1 MiB  of which activations ")
    summary = (result.folder / "summary.json").read_text()
    assert f'"policy": "plan",\n  "memory_budget_bytes": {parse_bytes("1.2MiB")},\n  "planned_peak_bytes": ' in summary
    assert "images, planned\n" in result.report()
    assert "1.1 MiB with model, gradients and optimizer, of a budget of 1.2 MiB\n" in result.report()


def test_rejects_a_budget_that_is_too_small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        BudgetError, match=r"`memory_budget` \(='100KiB'\) is .* below the least .* pass a `batch_size` of \d+ or less"
    ):
        train(TrainConfig(model=TINY, memory_budget="100KiB"), quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "policy", "how"),
    [
        ("revnet38", "checkpoint", "checkpointed"),
        ("resnet32", "checkpoint", "checkpointed"),
        ("revnet38", "store", "stored"),
        ("resnet32", "reverse", "stored"),
    ],
)
def test_applies_one_policy_to_all_blocks(out_dir, model, policy, how):
    watch = WatchUpdates()
    config = TrainConfig(model=model, policy=policy, max_updates=1, batch_size=20, out_dir=out_dir)
    result = train(config, quiet=True, callbacks=[watch])
    assert set(watch.policies) == {Checkpoint() if how == "checkpointed" else Store()}
    assert f"images, {how}\n" in result.report()
    assert (result.stored_peak_bytes is None) == (how == "stored")
    assert not (Path(out_dir) / "plan.txt").exists()


def test_planning_does_not_change_random_numbers(tmp_path):
    states = []
    # Within a budget of 1 GiB, the plan stores all.
    for name, settings in (("stored", {"policy": "store"}), ("planned", {"memory_budget": "1GiB"})):
        config = TrainConfig(model=TINY, max_updates=2, out_dir=str(tmp_path / name), **settings)
        result = train(config, quiet=True)
        states.append(load_file(result.folder / "last.safetensors"))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_update_holds_and_keeps_what_the_settings_name(out_dir):
    """The settings are saved with the run."""
    settings = {"max_updates": 2, "batch_size": 50}
    watch = WatchUpdates()
    result = train(
        TrainConfig(**settings, hold="f,g", keep="g.convolution.0", out_dir=out_dir), quiet=True, callbacks=[watch]
    )
    assert Reverse(hold=("f", "g"), keep="g.convolution.0") in watch.policies
    saved = (result.folder / "config.yaml").read_text()
    assert "hold: f,g" in saved
    assert "keep: g.convolution.0" in saved
    assert result.peak_bytes > train(TrainConfig(**settings, out_dir=f"{out_dir}-2"), quiet=True).peak_bytes
    with pytest.raises(
        ValueError, match=r"`keep` of Reverse\(keep=\('h.linear',\)\) names the residual function 'h', but"
    ):
        train(TrainConfig(**settings, keep="h.linear", out_dir=f"{out_dir}-3"), quiet=True)
