"""What a run does with its activations: one policy for all, or a plan for a budget; and what that comes to."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from revnet.data import Preprocess
from revnet.errors import BudgetError
from revnet.memory import Plan, format_bytes, plan, predict
from revnet.nn import Checkpoint, Store, policy_holders, set_policy
from revnet.training._device import find_device
from revnet.training.classifier import Classifier, Header
from revnet.training.config import TrainConfig
from revnet.training.optimizers import optimizer_factory

_POLICIES = {"checkpoint": Checkpoint(), "store": Store()}  # and "reverse" is what models have


def make_plan(config: TrainConfig, header: Header, preprocess: Preprocess) -> Plan | None:
    """Plan an update within `config.memory_budget`, if there is one.

    Nothing is timed: a run that is resumed must have the same plan, since policies differ in the last digits of the
    gradients.

    Raises:
        BudgetError: No plan fits.
    """
    if config.memory_budget is None:
        return None

    def loss(logits: Tensor) -> Tensor:
        labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        return F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)

    device = find_device(config.device)
    with torch.device("meta"):
        model = Classifier.create(header, preprocess).model
        images = torch.empty(config.batch_size, *header.image_shape)
    try:
        return plan(
            model,
            images,
            budget=config.memory_budget,
            optimizer=optimizer_factory(config),
            loss=loss,
            autocast=_autocast(config),
            device=device if device.type == "cuda" else "cpu",
        )
    except BudgetError as error:
        error.args = (str(error).replace("`budget`", "`memory_budget`"),)  # the name that the user gave it
        raise


def apply_policies(model: nn.Module, config: TrainConfig, made_plan: Plan | None) -> None:
    """Give `model` the policies of the plan, or the one of the settings."""
    if made_plan is not None:
        made_plan.apply(model)
    elif config.policy in _POLICIES:
        set_policy(model, _POLICIES[config.policy])


def tell_plan(made_plan: Plan) -> str:
    """The plan in one line."""
    counts = Counter(type(unit.policy).__name__.lower() for unit in made_plan.units)
    units = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return (
        f"peak {format_bytes(made_plan.peak_bytes)} of {format_bytes(made_plan.budget_bytes)}, step time "
        f"{made_plan.time_ratio:.2f} of storing all; {len(made_plan.units)} units: {units}"
    )


def tell_policy(config: TrainConfig, made_plan: Plan | None, *, is_stored: bool) -> str:
    """What is done with activations, in one word; a model may store all of them, whatever the settings say."""
    return "plan" if made_plan is not None else "store" if is_stored else config.policy


def count_peak_bytes(classifier: Classifier, config: TrainConfig) -> tuple[int, int | None]:
    """The activations of an update, counted by shapes alone.

    Returns:
        Those of the model under its policies, and those with all of them stored, if they are not.
    """
    with torch.device("meta"):
        twin = Classifier.create(classifier.header, classifier.preprocess).model
        batch = torch.empty(config.batch_size, *classifier.header.image_shape)
    for holder, original in zip(policy_holders(twin).values(), policy_holders(classifier.model).values(), strict=True):
        holder.set_policies(original.policies)
    peak_bytes = predict(twin, batch, autocast=_autocast(config)).activation_bytes
    if all(policy == Store() for holder in policy_holders(twin).values() for policy in holder.policies):
        return peak_bytes, None
    set_policy(twin, Store())
    return peak_bytes, predict(twin, batch, autocast=_autocast(config)).activation_bytes


def _autocast(config: TrainConfig) -> torch.dtype | None:
    return torch.bfloat16 if config.precision == "bf16-mixed" else None
