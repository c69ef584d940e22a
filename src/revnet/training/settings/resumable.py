"""The settings that may change when a run is resumed."""

import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from revnet.training.settings.run_config import AbstractRunConfig

_Config = TypeVar("_Config", bound=AbstractRunConfig)

_RESUMABLE = frozenset(
    {
        # where the data are
        "data",
        "tokenizer",  # the same one, in another file
        "on_corrupt",
        # how long the run trains, and how fast
        "epochs",
        "max_updates",
        "lr",
        # devices and processes
        "device",
        "devices",
        "num_nodes",
        "strategy",
        "num_threads",
        "num_workers",
        # memory: these change the last digits of the gradients only
        "policy",
        "hold",
        "keep",
        "memory_budget",
        "chunked_loss",
        "step_in_backward",
        # execution
        "compile",
        "cuda_graphs",
        "deterministic",
        "profile",
        # files
        "save_every",
        "keep_checkpoints",
        "async_save",
        "logger",
        "log_every",
    }
)


def change_settings(config: _Config, changes: Mapping[str, Any]) -> _Config:
    """Return the settings of a run with `changes`; None leaves a setting as it is.

    The number of epochs and the number of updates limit each other, so a new one of them lifts the other, unless both
    are given.

    Raises:
        TypeError: A setting does not exist.
        ValueError: A setting cannot change within a run.
    """
    known = {setting.name for setting in fields(config)}
    given = {name: value for name, value in changes.items() if value is not None}
    for name, value in given.items():
        if name not in known:
            raise TypeError(f"`{name}` is not a setting of the run; `{config.command} --help` lists them all.")
        before = getattr(config, name)
        is_same = list(value) == list(before) if isinstance(before, tuple) else value == before
        if not is_same and name not in _RESUMABLE:
            raise ValueError(
                f"`{name}` (={value!r}) cannot change within a run, which has {before!r}; leave it out, or start a new "
                "run."
            )
    changed = {name: value for name, value in given.items() if name in _RESUMABLE}
    if "epochs" in given and "max_updates" not in given:
        changed["max_updates"] = None
    if "max_updates" in given and "epochs" not in given and config.max_updates is not None:
        changed["epochs"] = sys.maxsize  # the epochs in the file are the ones of the old limit
    return replace(config, **changed)


def list_changes(before: AbstractRunConfig, after: AbstractRunConfig) -> list[str]:
    """Return a line about each setting that differs."""
    pairs = [(field.name, getattr(before, field.name), getattr(after, field.name)) for field in fields(before)]
    return [f"{name} {_text(old)} -> {_text(new)}" for name, old, new in pairs if old != new]


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
