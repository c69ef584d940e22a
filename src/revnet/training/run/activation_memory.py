"""The activations of a run: one policy for all blocks, or a plan for a budget, and the memory that they take."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from revnet._units import counted
from revnet.errors import BudgetError
from revnet.memory import Plan, format_bytes, plan, predict
from revnet.nn import AbstractPolicy, Reverse, Store, set_policy
from revnet.nn._cross_entropy_head import cross_entropy_heads
from revnet.nn._whole_model import policy_holders
from revnet.training.device import find_device
from revnet.training.processes.world import current_world
from revnet.training.run.precision import autocast_dtype
from revnet.training.settings.run_config import AbstractRunConfig


class PeakBytes(NamedTuple):
    """Peak activation memory of an update."""

    trained: int
    """Peak of the model under its policies."""
    stored: int | None
    """Peak of the stored twin; None if the model stores all activations itself."""


@dataclass(frozen=True, eq=False)
class Update:
    """An update in the form that the memory tools take: shapes, without data."""

    make_model: Callable[[], nn.Module]
    """Function that makes the model; called under the meta device."""
    make_batch: Callable[[], Tensor]
    """Function that makes a batch; called under the meta device."""
    loss: Callable[[Any], Tensor] | None
    """Function from the output of the model to a scalar; None if the model returns the loss."""
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    """Function that makes the optimizer of the model."""
    make_targets: Callable[[], Tensor] | None = None
    """Function that makes the targets of a model that returns the loss; called under the meta device."""
    make_mask: Callable[[], Tensor] | None = None
    """Function that makes the mask of a model that takes one; called under the meta device."""
    chunked_loss: bool | Literal["auto"] | None = None
    """Argument of `plan`."""

    def make_step(self) -> tuple[nn.Module, Tensor, Mapping[str, Tensor]]:
        """Return the model, a batch, and the keyword arguments of the model, on the meta device."""
        with torch.device("meta"):
            model, batch = self.make_model(), self.make_batch()
            makers = {"targets": self.make_targets, "mask": self.make_mask}
            return model, batch, {name: make() for name, make in makers.items() if make is not None}


def make_plan(config: AbstractRunConfig, update: Update) -> Plan | None:
    """Plan an update within `config.memory_budget`, if there is one.

    Times are counted and not measured: a resumed run must have the same plan, because policies differ in the last
    digits of the gradients.

    Raises:
        BudgetError: No plan fits.
        ValueError: The optimizer does not fit the model.
    """
    if config.memory_budget is None and config.optimizer != "muon":
        return None
    device = find_device(config.device)
    model, batch, kwargs = update.make_step()
    optimizer = update.optimizer(model)  # Muon needs a matrix; the others fit every model
    if config.memory_budget is None:
        return None
    try:
        return plan(
            model,
            batch,
            budget=config.memory_budget,
            kwargs=kwargs,
            optimizer=optimizer,
            step_in_backward=config.step_in_backward,
            chunked_loss=update.chunked_loss,
            loss=update.loss,
            autocast=autocast_dtype(config),
            device=device if device.type == "cuda" else "cpu",
        )
    except BudgetError as error:
        raise _budget_error(config.memory_budget, error) from error


def apply_policies(model: nn.Module, config: AbstractRunConfig, memory_plan: Plan | None) -> None:
    """Give `model` the policies of the plan, or the policy of the settings.

    Raises:
        ValueError: `hold` or `keep` names a residual function that a block does not have.
    """
    if memory_plan is not None:
        memory_plan.apply(model)
    elif config.hold is not None or config.keep is not None:
        policy = Reverse(hold=config.hold or (), keep=config.keep or ())
        set_policy(model, policy)
        for holder in policy_holders(model).values():
            for unit in holder.policy_units:
                if unit.half_blocks:
                    policy.moves_for(unit.half_blocks)  # Refuses names of functions that the unit does not have.
    elif config.policy != "reverse":  # the default of every model that can reverse
        set_policy(model, config.policy)


def describe_plan(memory_plan: Plan) -> str:
    """Return the plan as one line of text."""
    counts = Counter(
        type(unit.policy).__name__.lower() + (" with hold or keep" if _has_moves(unit.policy) else "")
        for unit in memory_plan.units
    )
    units = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return (
        f"peak {format_bytes(memory_plan.peak_bytes)} of {format_bytes(memory_plan.budget_bytes)}, step time "
        f"{memory_plan.time_ratio:.2f} of storing all; {counted(len(memory_plan.units), 'unit')}: {units}"
        + ("; chunked loss" if memory_plan.chunked_loss else "")
    )


def _has_moves(policy: AbstractPolicy) -> bool:
    return isinstance(policy, Reverse) and policy != Reverse()


def policy_name(config: AbstractRunConfig, memory_plan: Plan | None, *, is_stored: bool) -> str:
    """Return the policy of a run in one word; `store` if the model ignores the settings and stores everything."""
    return "plan" if memory_plan is not None else "store" if is_stored else config.policy


def count_peak_bytes(model: nn.Module, config: AbstractRunConfig, update: Update) -> PeakBytes:
    """Count the activations of an update of `model` from shapes alone."""
    twin, batch, kwargs = update.make_step()
    for holder, original in zip(policy_holders(twin).values(), policy_holders(model).values(), strict=True):
        holder.set_policies(original.policies)
    for head, original_head in zip(cross_entropy_heads(twin), cross_entropy_heads(model), strict=True):
        head.is_chunked = original_head.is_chunked

    def count() -> int:
        return predict(twin, batch, kwargs=kwargs, autocast=autocast_dtype(config)).activation_bytes

    peak_bytes = count()
    if all(policy == Store() for holder in policy_holders(twin).values() for policy in holder.policies):
        return PeakBytes(peak_bytes, None)
    set_policy(twin, Store())
    return PeakBytes(peak_bytes, count())


def _budget_error(memory_budget: str, error: BudgetError) -> BudgetError:
    """Return the error in terms of the settings of a run."""
    # The plan is for the part of a batch that one process computes.
    size = error.max_batch_size * current_world().num_processes
    way_out = f"pass a `batch_size` of {size} or less" if size else "no batch would fit; pass a smaller model"
    return BudgetError(
        f"`memory_budget` (={memory_budget!r}) is {format_bytes(error.missing_bytes)} below the least that an update "
        f"needs, {format_bytes(error.least_bytes)}; {way_out}, or a larger budget.",
        missing_bytes=error.missing_bytes,
        least_bytes=error.least_bytes,
        max_batch_size=size,
    )
