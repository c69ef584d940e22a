"""Ctrl-C and SIGTERM: a run saves first and then stops, and a second signal stops it at once."""

import signal
import time
from dataclasses import replace

import pytest
from lightning.pytorch import Callback

from revnet.training import NiceConfig, TrainConfig, TrainingInterrupted, resume, train
from revnet.training.run import stop_signals
from tests.training.samples import TINY, assert_same_run

# With one thread also in `straight`, which is trained outside of a test.
NICE = NiceConfig(batch_size=200, epochs=3, num_couplings=2, hidden_dim=16, num_hidden=1, num_threads=1)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Return a run that was not stopped."""
    return train(replace(NICE, out_dir=str(tmp_path_factory.mktemp("straight") / "run")), quiet=True)


class SendSignal(Callback):
    """Send a signal to this process in a hook, when it is called for the `nth` time."""

    def __init__(self, hook, nth, number=signal.SIGTERM, repeat_after=None):
        self.count = 0

        def send(*_, **__):
            self.count += 1
            if self.count == nth:
                signal.raise_signal(number)
                if repeat_after is not None:
                    time.sleep(repeat_after)
                    signal.raise_signal(number)

        setattr(self, hook, send)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_saves_and_stops_at_a_signal(out_dir, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    message = f"^stopped; `revnet train --resume {out_dir}` continues after update 8\\.$"
    with pytest.raises(TrainingInterrupted, match=message) as caught:
        train(replace(NICE, out_dir=out_dir), quiet=True, callbacks=[SendSignal("on_train_batch_end", 8, number)])
    assert caught.value.signal_number == number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(
    ("hook", "nth", "update"),
    [
        ("on_train_batch_start", 1, 1),
        ("on_train_batch_end", 6, 6),  # the last batch of an epoch
        ("on_validation_start", 2, 12),
        ("on_validation_batch_end", 1, 6),
        ("on_train_epoch_end", 2, 12),
        ("on_train_epoch_start", 2, 7),
    ],
)
def test_run_stopped_anywhere_resumes_bit_for_bit(straight, tmp_path, hook, nth, update):
    folder = tmp_path / "stopped"
    with pytest.raises(TrainingInterrupted, match=f"continues after update {update}\\."):
        train(replace(NICE, out_dir=str(folder)), quiet=True, callbacks=[SendSignal(hook, nth)])
    assert_same_run(straight, resume(folder, quiet=True))


def test_classifier_stopped_in_a_validation_repeats_it(tmp_path):
    config = TrainConfig(model=TINY, batch_size=400, epochs=2, max_updates=5)
    straight = train(replace(config, out_dir=str(tmp_path / "straight")), quiet=True)
    folder = tmp_path / "stopped"
    with pytest.raises(TrainingInterrupted, match=r"continues after update 3\."):
        train(replace(config, out_dir=str(folder)), quiet=True, callbacks=[SendSignal("on_validation_batch_end", 1)])
    assert_same_run(straight, resume(folder, quiet=True))


def test_second_signal_stops_at_once(out_dir, monkeypatch):
    monkeypatch.setattr(stop_signals, "_SAME_STOP_SECONDS", 0.0)
    stop = SendSignal("on_train_batch_start", 8, repeat_after=0.01)
    message = f"^stopped at once; `revnet train --resume {out_dir}` continues after update 6\\.$"
    with pytest.raises(TrainingInterrupted, match=message):
        train(replace(NICE, out_dir=out_dir), quiet=True, callbacks=[stop])


def test_second_signal_that_comes_at_once_is_the_same_stop(out_dir):
    stop = SendSignal("on_train_batch_start", 8, repeat_after=0.0)
    with pytest.raises(TrainingInterrupted, match=r"^stopped; .* continues after update 8\.$"):
        train(replace(NICE, out_dir=out_dir), quiet=True, callbacks=[stop])


def test_run_stopped_before_its_first_checkpoint_starts_from_the_beginning(straight, tmp_path):
    folder = tmp_path / "stopped"
    message = f"^stopped; `revnet train --resume {folder}` continues from the beginning\\.$"
    with pytest.raises(TrainingInterrupted, match=message):
        train(replace(NICE, out_dir=str(folder)), quiet=True, callbacks=[SendSignal("setup", 1)])
    assert_same_run(straight, resume(folder, quiet=True))
