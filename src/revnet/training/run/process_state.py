"""The part of a run's state that differs between its processes: running means and keyframes."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _Metadata, _ResultMetric, _Sync
from torch import Tensor
from torchmetrics import Metric

from revnet.nn import ReversibleSequential
from revnet.training.processes.join import gather

_META = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph", "add_dataloader_idx")
_EXTREMES = ("max", "min")


class ProcessState(Callback):
    """Keep in the checkpoint what each process has for itself.

    This is the running means of the epoch so far, which Lightning does not save, and the keyframes of reversible
    sequences with a tolerance, whose positions decide the last digits of the gradients. The statistics of batch norm
    differ too, but only the ones of the main process are ever read.

    On another number of processes, the first one takes the sums of all, and the others start from zero; the rest is
    dealt out in turn.
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._restored: list[dict[str, Any]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the trainer."""
        self._trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all processes."""
        assert self._trainer is not None
        return {"processes": gather(_state_of(self._trainer))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the state until training starts."""
        self._restored = state_dict["processes"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the state of this process."""
        states, self._restored = self._restored, None
        if states is None:
            return
        rank = trainer.global_rank
        own = states[rank % len(states)]
        is_same_number = len(states) == trainer.world_size
        means = [own] if is_same_number else states if rank == 0 else []
        _restore_means(trainer, means)
        for name, sequence in _sequences(pl_module).items():
            sequence.restore_tolerance(own["tolerance"].get(name))


def _state_of(trainer: Trainer) -> dict[str, Any]:
    module = trainer.lightning_module
    epoch: Any = trainer.fit_loop.epoch_progress.current
    is_within_epoch = epoch.processed < epoch.ready
    return {
        "means": {key: _save_mean(x) for key, x in _results(trainer).items() if is_within_epoch and not x.has_reset},
        "tolerance": {name: sequence.tolerance_state() for name, sequence in _sequences(module).items()},
    }


def _sequences(module: LightningModule) -> dict[str, ReversibleSequential]:
    return {name: part for name, part in module.named_modules() if isinstance(part, ReversibleSequential)}


def _results(trainer: Trainer) -> dict[str, Any]:
    return trainer.fit_loop.epoch_loop._results  # of training, also during a validation


def _save_mean(result: Any) -> dict[str, Any]:
    metric = result if result.is_tensor else result.value
    return {
        "meta": {name: getattr(result.meta, name) for name in _META},
        "reduce_fx": result.meta.reduce_fx.__name__,
        "attribute": result.meta.metric_attribute,
        "is_synced": result.meta.sync.should,
        "values": {name: _to_cpu(value) for name, value in metric.metric_state.items()},
        "num_updates": metric.update_count,
    }


def _restore_means(trainer: Trainer, states: list[dict[str, Any]]) -> None:
    results = _results(trainer)
    for key, saved in (states[0]["means"] if states else {}).items():
        result = results[key] = _make_result(saved, trainer)
        metric = result if result.is_tensor else result.value
        for state in states:
            _add(metric, state["means"][key], trainer)
        result.has_reset = False
        result._update_count = metric._update_count
        # Otherwise Lightning takes the next batch for the first of the epoch, and resets the means.
        trainer._logger_connector._first_loop_iter = True


def _make_result(saved: Mapping[str, Any], trainer: Trainer) -> Any:
    meta = _Metadata(**saved["meta"], reduce_fx=getattr(torch, saved["reduce_fx"]), metric_attribute=saved["attribute"])
    meta.sync = _Sync(fn=trainer.strategy.reduce, _should=saved["is_synced"])
    result = _ResultMetric(meta, is_tensor=saved["attribute"] is None)
    if saved["attribute"] is not None:
        metric = trainer.lightning_module.get_submodule(saved["attribute"])
        assert isinstance(metric, Metric)
        result.value = metric
    return result.to(trainer.strategy.root_device)


def _add(metric: Any, saved: Mapping[str, Any], trainer: Trainer) -> None:
    """Add the saved state of one process to `metric`."""
    device = trainer.strategy.root_device
    for name, value in saved["values"].items():
        value = _to(value, device)
        current = getattr(metric, name)
        if metric._update_count == 0:
            setattr(metric, name, value)
        elif isinstance(value, list):
            setattr(metric, name, [*current, *value])
        else:
            reduction = saved["reduce_fx"] if saved["reduce_fx"] in _EXTREMES else None
            reduce = getattr(torch, reduction) if reduction and saved["attribute"] is None else metric._reductions[name]
            setattr(metric, name, reduce(torch.stack([current, value])))
    metric._update_count += saved["num_updates"]


def _to_cpu(value: Any) -> Any:
    return _to(value, torch.device("cpu"), copy=True)


def _to(value: Any, device: torch.device, *, copy: bool = False) -> Any:
    if isinstance(value, list):
        return [_to(item, device, copy=copy) for item in value]
    assert isinstance(value, Tensor)
    return value.detach().to(device, copy=copy)
