import pytest

from revnet.cli.main import main
from revnet.training import TrainConfig, find_lr
from tests.training.samples import TINY


def test_suggests_a_rate_where_the_loss_falls(tmp_path):
    trial = find_lr(TrainConfig(model=TINY, batch_size=32, ema_decay=0.9, patience=3), num_updates=60)
    assert len(trial.rates) == len(trial.losses) <= 60
    assert trial.rates[0] == pytest.approx(1e-6)
    index = trial.rates.index(trial.suggestion)
    assert trial.losses[index + 1] < trial.losses[index - 1]
    assert f"pass `--lr {trial.suggestion:.2g}`" in trial.report()
    trial.plot(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 1000


@pytest.mark.parametrize("num_updates", [19, 20.0])
def test_rejects_a_trial_that_is_too_short(num_updates):
    with pytest.raises(ValueError, match=r"`num_updates` \(=.*\) must be an integer of 20 or more"):
        find_lr(TrainConfig(), num_updates=num_updates)


def test_rejects_several_processes():
    with pytest.raises(ValueError, match=r"^`devices` \(=2\) must be 1 to find a learning rate; leave it out"):
        find_lr(TrainConfig(device="cpu", devices=2))


def test_command_draws_and_exits(tmp_path, capsys):
    arguments = ["train", "nice", "--find-lr", "--hidden-dim", "8", "--batch-size", "20", "--out-dir", str(tmp_path)]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert f"picture {tmp_path / 'learning_rates.png'}" in captured.out
    assert captured.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["learning_rates.png"]


def test_command_refuses_a_run(capsys):
    assert main(["train", "--find-lr", "--resume", "runs/any"]) == 2
    assert "`--find-lr` is for a new run; leave out `--resume`" in capsys.readouterr().err
