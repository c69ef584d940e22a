"""The settings that runs share which are trained by AdamW along a cosine, and their checks."""

from __future__ import annotations

from typing import Protocol, get_args

from revnet.training._checks import check_choice, check_integer, check_memory_budget, check_name, check_number
from revnet.training._settings import RunSettings
from revnet.training.choices import Device, Policy, Precision


class AdamWSettings(RunSettings, Protocol):
    """What runs share that are trained by AdamW along a cosine."""

    @property
    def epochs(self) -> int: ...
    @property
    def max_updates(self) -> int | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def warmup(self) -> float: ...
    @property
    def beta2(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float | None: ...
    @property
    def seed(self) -> int: ...


def check_run_settings(config: AdamWSettings) -> None:
    """Raise unless the settings that such runs share are in their ranges."""
    check_integer("epochs", config.epochs, at_least=1)
    check_integer("batch_size", config.batch_size, at_least=1)
    check_integer("seed", config.seed, at_least=0, at_most=2**32 - 1)
    check_number("lr", config.lr, "above 0 and at most 0.05", lambda x: 0 < x <= 0.05, "0.001 is usual")
    check_number("warmup", config.warmup, "from 0 to below 1", lambda x: 0 <= x < 1, "0.05 is usual")
    check_number("beta2", config.beta2, "from 0 to below 1", lambda x: 0 <= x < 1, "0.999 is usual")
    check_number("weight_decay", config.weight_decay, "0 or more", lambda x: x >= 0, "0.1 is usual")
    if config.max_grad_norm is not None:
        check_number("max_grad_norm", config.max_grad_norm, "above 0", lambda x: x > 0, "1 is usual")
    for name in ("max_updates", "num_threads"):
        if getattr(config, name) is not None:
            check_integer(name, getattr(config, name), at_least=1)
    for name, choices in (("precision", Precision), ("device", Device), ("policy", Policy)):
        check_choice(name, getattr(config, name), get_args(choices))
    if config.memory_budget is not None:
        check_memory_budget(config.memory_budget, config.policy)
    if config.out_dir is not None:
        check_name("out_dir", config.out_dir)
