"""What a run does with its activations: one policy for all, or a plan for a budget; and what that comes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revnet.errors import BudgetError
from revnet.memory import Plan, format_bytes, plan, predict
from revnet.nn import Store, policy_holders, set_policy
from revnet.training._device import find_device
from revnet.training._settings import RunSettings


class PeakBytes(NamedTuple):
    """Peak activation memory of an update."""

    trained: int
    """Of the model under its policies."""
    stored: int | None
    """Of its twin that stores all activations; None if the model does so itself."""


@dataclass(frozen=True, eq=False)
class Update:
    """An update as the memory tools take it: shapes, and no data."""

    make_model: Callable[[], nn.Module]
    """Makes the model; called under the meta device."""
    make_batch: Callable[[], Tensor]
    """Makes what it takes; called under the meta device."""
    loss: Callable[[Any], Tensor]
    """From what it gives to a scalar."""
    optimizer: Callable[..., torch.optim.Optimizer]
    """Makes the optimizer of parameters."""


def make_plan(config: RunSettings, update: Update) -> Plan | None:
    """Plan an update within `config.memory_budget`, if there is one.

    Nothing is timed: a run that is resumed must have the same plan, since policies differ in the last digits of the
    gradients.

    Raises:
        BudgetError: No plan fits.
    """
    if config.memory_budget is None:
        return None
    device = find_device(config.device)
    with torch.device("meta"):
        model, batch = update.make_model(), update.make_batch()
    try:
        return plan(
            model,
            batch,
            budget=config.memory_budget,
            optimizer=update.optimizer,
            loss=update.loss,
            autocast=_autocast(config),
            device=device if device.type == "cuda" else "cpu",
        )
    except BudgetError as error:
        error.args = (str(error).replace("`budget`", "`memory_budget`"),)  # the name that the user gave it
        raise


def apply_policies(model: nn.Module, config: RunSettings, made_plan: Plan | None) -> None:
    """Give `model` the policies of the plan, or the one of the settings."""
    if made_plan is not None:
        made_plan.apply(model)
    elif config.policy != "reverse":  # Models have this one already, where they can take it.
        set_policy(model, config.policy)


def tell_plan(made_plan: Plan) -> str:
    """The plan in one line."""
    counts = Counter(type(unit.policy).__name__.lower() for unit in made_plan.units)
    units = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return (
        f"peak {format_bytes(made_plan.peak_bytes)} of {format_bytes(made_plan.budget_bytes)}, step time "
        f"{made_plan.time_ratio:.2f} of storing all; {len(made_plan.units)} units: {units}"
    )


def tell_policy(config: RunSettings, made_plan: Plan | None, *, is_stored: bool) -> str:
    """What is done with activations, in one word; a model may store all of them, whatever the settings say."""
    return "plan" if made_plan is not None else "store" if is_stored else config.policy


def count_peak_bytes(model: nn.Module, config: RunSettings, update: Update) -> PeakBytes:
    """The activations of an update of `model`, counted by shapes alone."""
    with torch.device("meta"):
        twin, batch = update.make_model(), update.make_batch()
    for holder, original in zip(policy_holders(twin).values(), policy_holders(model).values(), strict=True):
        holder.set_policies(original.policies)

    def count() -> int:
        return predict(twin, batch, autocast=_autocast(config)).activation_bytes

    peak_bytes = count()
    if all(policy == Store() for holder in policy_holders(twin).values() for policy in holder.policies):
        return PeakBytes(peak_bytes, None)
    set_policy(twin, Store())
    return PeakBytes(peak_bytes, count())


def _autocast(config: RunSettings) -> torch.dtype | None:
    return torch.bfloat16 if config.precision == "bf16-mixed" else None
