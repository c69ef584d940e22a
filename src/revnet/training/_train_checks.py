"""Checks of the settings of a run that trains a classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

from revnet.training._checks import check_choice, check_integer, check_memory_budget, check_name, check_number
from revnet.training.choices import Device, OnCorrupt, Optimizer, Policy, Precision, Preprocessing, Schedule

if TYPE_CHECKING:
    from revnet.training.config import TrainConfig

# Each update of AdamW moves every weight by about the learning rate: with that of SGD nothing is learnt.
_HIGHEST_LR_OF_ADAMW = 0.05


def check_train_config(config: TrainConfig) -> None:
    """Raise unless each setting is in its range, and they go together.

    Raises:
        TypeError: A setting has the wrong type.
        ValueError: A setting lies outside its range.
    """
    _check_needed(config)
    _check_choices(config)
    _check_activations(config)
    _check_optional_counts(config)
    _check_flags(config)
    _check_optimizer(config)


def _check_needed(config: TrainConfig) -> None:
    for name in ("data", "model"):
        check_name(name, getattr(config, name))
    check_integer("epochs", config.epochs, at_least=1)
    check_integer("batch_size", config.batch_size, at_least=1)
    check_integer("seed", config.seed, at_least=0, at_most=2**32 - 1)
    check_number("lr", config.lr, "above 0", lambda x: x > 0, "0.1 is usual")
    check_number("decay_factor", config.decay_factor, "above 0 and at most 1", lambda x: 0 < x <= 1, "0.1 is usual")
    check_number("momentum", config.momentum, "from 0 to below 1", lambda x: 0 <= x < 1, "0.9 is usual")
    check_number("weight_decay", config.weight_decay, "0 or more", lambda x: x >= 0, "2e-4 is usual")
    check_number("val_fraction", config.val_fraction, "from 0 to below 1", lambda x: 0 <= x < 1, "0.1 is usual")
    check_number("warmup", config.warmup, "from 0 to below 1", lambda x: 0 <= x < 1, "0.05 is usual")
    check_number("label_smoothing", config.label_smoothing, "from 0 to below 1", lambda x: 0 <= x < 1, "0.1 is usual")
    check_number("full_size_at", config.full_size_at, "above 0 and at most 1", lambda x: 0 < x <= 1, "0.6 is usual")


def _check_choices(config: TrainConfig) -> None:
    for name, choices in (
        ("precision", Precision),
        ("device", Device),
        ("schedule", Schedule),
        ("optimizer", Optimizer),
        ("policy", Policy),
        ("on_corrupt", OnCorrupt),
    ):
        check_choice(name, getattr(config, name), get_args(choices))
    if config.preprocess is not None:
        check_choice("preprocess", config.preprocess, get_args(Preprocessing))


def _check_activations(config: TrainConfig) -> None:
    if config.memory_budget is not None:
        check_memory_budget(config.memory_budget, config.policy)
    if config.tolerance is None:
        return
    check_number("tolerance", config.tolerance, "above 0 and below 1", lambda x: 0 < x < 1, "1e-3 is usual")
    if config.exact:
        raise ValueError(
            f"`tolerance` (={config.tolerance}) bounds an error that there is none of with `exact`; leave one of the "
            "two out."
        )
    if config.policy != "reverse":
        raise ValueError(
            f"`tolerance` (={config.tolerance}) is for what is rebuilt, and the `policy` {config.policy} rebuilds "
            "nothing; leave one of the two out."
        )


def _check_optional_counts(config: TrainConfig) -> None:
    check_integer("cutout", config.cutout, at_least=0)
    for name, at_least in (
        ("max_updates", 1),
        ("drift_every", 1),
        ("crop_padding", 0),
        ("image_size", 1),
        ("start_size", 1),
        ("num_threads", 1),
        ("num_workers", 0),
    ):
        if getattr(config, name) is not None:
            check_integer(name, getattr(config, name), at_least=at_least)


def _check_flags(config: TrainConfig) -> None:
    for name in ("exact", "nesterov", "color_distortion"):
        if getattr(config, name) not in (True, False):
            raise TypeError(f"`{name}` (={getattr(config, name)!r}) must be true or false.")
    if config.horizontal_flip not in (True, False, None):
        raise TypeError(f"`horizontal_flip` (={config.horizontal_flip!r}) must be true, false or null.")


def _check_optimizer(config: TrainConfig) -> None:
    if config.optimizer == "adamw" and config.nesterov:
        raise ValueError("`nesterov` (=True) is for the `optimizer` sgd, not for adamw; leave it out.")
    if config.optimizer == "adamw" and config.lr > _HIGHEST_LR_OF_ADAMW:
        raise ValueError(
            f"`lr` (={config.lr}) must be {_HIGHEST_LR_OF_ADAMW} or less with the `optimizer` adamw; 0.001 is usual."
        )
    if config.nesterov and config.momentum == 0:
        raise ValueError("`nesterov` (=True) needs a `momentum` above 0; 0.9 is usual.")
