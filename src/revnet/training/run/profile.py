"""Record some updates with PyTorch's profiler."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from revnet._atomic_file import atomic_path
from revnet._text_table import aligned
from revnet._units import counted, format_seconds
from revnet.training.run.task import AbstractTask

_NUM_ROWS = 10


class ProfileUpdates(Callback):
    """Record some updates, write their trace, and print the operators that take the longest.

    The first updates of a process, in which memory is allocated and kernels are chosen, are left out if there are
    enough others.

    Args:
        path: File of the trace, in Chrome's format.
        num_skipped: Number of updates to leave out.
        num_recorded: Number of updates to record.
        quiet: Print nothing.
    """

    # Lightning's own profiler counts calls of `training_step`, without the backward pass and the optimizer.

    def __init__(self, path: Path, *, num_skipped: int = 3, num_recorded: int = 3, quiet: bool = False) -> None:
        self._path = path
        self._num_skipped = num_skipped
        self._num_recorded = num_recorded
        self._quiet = quiet
        self._profile: Any = None
        self._first: int | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start recording if it is time."""
        if not trainer.is_global_zero:
            return
        if self._first is None:
            assert isinstance(pl_module, AbstractTask)
            num_left = pl_module.num_updates - trainer.global_step
            self._first = trainer.global_step + max(0, min(self._num_skipped, num_left - self._num_recorded))
        if self._profile is None and trainer.global_step == self._first:
            activities = {"cuda": ProfilerActivity.CUDA, "xpu": ProfilerActivity.XPU}
            on_device = [activities[kind] for kind in activities if kind == pl_module.device.type]
            # One cycle has all events, but PyTorch 2.11 warns that it clears them unless they accumulate.
            recorder = profile(activities=[ProfilerActivity.CPU, *on_device], acc_events=True)
            recorder.start()
            self._profile = recorder

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop recording after the last of the updates, and write the trace."""
        if self._profile is None or self._first is None:
            return
        num_recorded = trainer.global_step - self._first
        if num_recorded >= self._num_recorded or trainer.should_stop:
            self._finish(num_recorded)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop recording if the run has fewer updates."""
        if self._profile is not None and self._first is not None:
            self._finish(trainer.global_step - self._first)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop recording, and write nothing."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _finish(self, num_updates: int) -> None:
        recorded, self._profile, self._first = self._profile, None, -1
        recorded.stop()
        with atomic_path(self._path) as temporary:
            recorded.export_chrome_trace(str(temporary))
        if not self._quiet:
            print(f"{counted(num_updates, 'update')} in {self._path}; the operators that take the longest:")
            print(_top_operators(recorded, num_updates), flush=True)


def _top_operators(recorded: Any, num_updates: int) -> str:
    """Return a table of the operators with the longest own time, on the GPU if there is one."""
    averages = list(recorded.key_averages())
    on_device = sum(average.self_device_time_total for average in averages) > 0
    name = "self_device_time_total" if on_device else "self_cpu_time_total"
    total = sum(getattr(average, name) for average in averages)
    averages.sort(key=lambda average: -getattr(average, name))
    rows = [
        (
            average.key[:60],
            f"{average.count / num_updates:.0f}",
            format_seconds(getattr(average, name) / 1e6 / num_updates),
            f"{100 * getattr(average, name) / total:.0f} %",
        )
        for average in averages[:_NUM_ROWS]
    ]
    return "\n".join(aligned([("operator", "calls", "time per update", "share"), *rows], num_left=1))
