"""Find a learning rate by a trial run in which it rises."""

import io
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.tuner.tuning import Tuner

from revnet._figure import clear_frame, new_figure, save
from revnet._palette import BLUE, RED
from revnet._units import counted
from revnet.training.entry import check_config, new_job
from revnet.training.processes.choose import choose_world
from revnet.training.run.execution import execution
from revnet.training.run.trainer import make_trainer, quiet
from revnet.training.settings.checks import is_index
from revnet.training.settings.run_config import AbstractRunConfig

_LOWEST, _HIGHEST = 1e-6, 1.0
_FEWEST = 20
_NUM_SETTLING = 10
"""Number of updates at the start to leave out, in which the smoothed loss settles."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RateTrial:
    """Losses of a trial run in which the learning rate rose."""

    suggestion: float | None
    """Learning rate at which the loss fell fastest; None if the trial was too short to say."""
    rates: list[float]
    """Learning rate of each update."""
    losses: list[float]
    """Loss of each update, smoothed."""

    def report(self) -> str:
        """Return the suggestion as text."""
        if self.suggestion is None:
            return f"no suggestion: the loss rose too soon, after {counted(len(self.losses), 'update')}"
        return f"learning rate {self.suggestion:.2g}, where the loss fell fastest; pass `--lr {self.suggestion:.2g}`"

    def plot(self, path: Path) -> None:
        """Draw the loss against the learning rate."""
        figure = new_figure(6, 3.6)
        axes = figure.subplots()
        axes.plot(self.rates, self.losses, color=BLUE)
        if self.suggestion is not None:
            label = f"suggestion {self.suggestion:.2g}"
            axes.axvline(self.suggestion, color=RED, linestyle=":", label=label)
            axes.legend(frameon=False)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss, smoothed")
        clear_frame(axes)
        save(figure, path)


def find_lr(config: AbstractRunConfig, *, num_updates: int = 100) -> RateTrial:
    """Train for some updates while the learning rate rises exponentially from 1e-6 to 1, and suggest one.

    The trial stops early when the loss diverges. It writes nothing and changes nothing: the weights are thrown away.
    The suggestion is the rate at which the loss fell fastest; with a warm-up, two or three times as much often works,
    too.

    Args:
        config: The settings of the run; its learning rate, schedule and length are not used.
        num_updates: Number of updates.

    Raises:
        TypeError: `config` holds no settings.
        ValueError: `num_updates` is below 20, a setting does not fit the data, or there are several processes.

    References:
        Smith (2017), Cyclical Learning Rates for Training Neural Networks, section 3.3.
    """
    check_config(config)
    if not is_index(num_updates) or num_updates < _FEWEST:
        raise ValueError(f"`num_updates` (={num_updates!r}) must be an integer of {_FEWEST} or more; 100 is usual.")
    world = choose_world(config.device, config.devices, config.num_nodes)
    if world.num_processes > 1:
        launcher = f", and start the trial without {world.launcher}" if world.launcher else ""
        raise ValueError(
            f"`devices` (={world.num_processes}) must be 1 to find a learning rate; leave it out{launcher}. The rate "
            "holds for a `batch_size` on any number of devices."
        )
    job = new_job(replace(config, schedule="constant", warmup=0.0, val_every=None, patience=None, ema_decay=None))
    with tempfile.TemporaryDirectory() as folder, quiet(), _bar_on_terminals_only():
        endless = replace(job.config, epochs=sys.maxsize, max_updates=None)
        trainer = make_trainer(endless, [], Path(folder))
        training, _ = job.make_loaders(trainer.strategy.root_device, num_parts=job.config.accumulate)
        with execution(job.config, job.task.saved_module.model):
            finder: Any = Tuner(trainer).lr_find(
                job.task, training, min_lr=_LOWEST, max_lr=_HIGHEST, num_training=num_updates, update_attr=False
            )
    losses = [float(loss) for loss in finder.results["loss"]]
    rates = [float(rate) for rate in finder.results["lr"][: len(losses)]]
    return RateTrial(suggestion=_steepest(rates, losses), rates=rates, losses=losses)


def _steepest(rates: list[float], losses: list[float]) -> float | None:
    """Return the rate at which the loss falls fastest on a logarithmic axis; None if it falls nowhere.

    Lightning's own suggestion takes a linear axis, on which the loss is always steepest at the left.
    """
    rates, losses = rates[_NUM_SETTLING:], losses[_NUM_SETTLING:]
    if len(losses) < 2:
        return None
    slopes = np.gradient(np.array(losses), np.log(rates))
    slopes[~np.isfinite(slopes)] = np.inf
    index = int(slopes.argmin())
    return rates[index] if slopes[index] < 0 else None


@contextmanager
def _bar_on_terminals_only() -> Iterator[None]:
    """Hide the progress bar, which Lightning draws on standard error, unless that is a terminal."""
    with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
        yield
