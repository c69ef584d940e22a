"""A model of the user's own, by its import path."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from revnet.nn.blocks._blocks_in_runs import blocks_in_runs
from revnet.training.classification.config import TrainConfig
from revnet.training.classification.model import ClassifierHeader
from revnet.training.import_path import call_object, import_object, is_import_path


def own_network(header: ClassifierHeader) -> nn.Module | None:
    """Return the user's own model if the header names one, None if it names a model of revnet.

    A function or class is called, with `num_classes` and `in_channels` if it takes them. A module is copied.

    Raises:
        ValueError: The object does not exist, or is not a model.
        UserCodeError: The user's code failed.
    """
    if not is_import_path(header.model):
        return None
    made = import_object(header.model, f"`model` (={header.model!r})")
    if isinstance(made, nn.Module):
        return copy.deepcopy(made)
    if callable(made):
        made = call_object("model", header.model, made, num_classes=header.num_classes, in_channels=header.in_channels)
    if not isinstance(made, nn.Module):
        raise ValueError(
            f"`model` (={header.model!r}) must be an nn.Module, or a function that returns one; got "
            f"{type(made).__name__}."
        )
    return made


def check_policies(config: TrainConfig, model: nn.Module) -> None:
    """Raise unless the settings about reversible blocks suit the model.

    Raises:
        ValueError: The model has no reversible block, or no block of the kind that a setting changes.
    """
    blocks = blocks_in_runs(model)
    of_sequences = {name: getattr(config, name) for name in ("exact", "tolerance")}
    of_all = {"drift_every": config.drift_every, "policy": config.policy if config.policy == "store" else None}
    if not blocks:
        _refuse(
            of_sequences | of_all, f"is for reversible models; {config.model} has no reversible block; leave it out"
        )
    elif all(block.original is not None for block in blocks):
        _refuse(
            of_sequences,
            f"does not change converted blocks, and {config.model} has no other reversible ones; leave it out, and set "
            "`fraction_bits` in the method of `revnet.convert`, which makes reversal exact",
        )


def _refuse(settings: Mapping[str, Any], reason: str) -> None:
    """Raise if one of the settings is given."""
    for name, value in settings.items():
        if value:
            raise ValueError(f"`{name}` (={value!r}) {reason}.")
