"""A Lightning callback that chooses policies for a memory budget."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden

from revnet._bytes import format_bytes, parse_bytes
from revnet._torch_internals import tree_leaves
from revnet.engine._drift import unmetered
from revnet.errors import BudgetError, PredictionError
from revnet.lightning._planned_policies import Row, rows_of, set_rows
from revnet.lightning._silent_step import SilentStep
from revnet.memory import Plan, plan
from revnet.nn import AbstractPolicy, add_policies
from revnet.nn._whole_model import policy_holders
from revnet.nn.policies._has_policies import as_policy
from revnet.training.run.activation_memory import describe_plan

_PREFIX = "module."
"""Start of the names of the units in `SilentStep`."""


class MemoryBudget(Callback):
    """Choose policies on the first batch, so that an update of any LightningModule fits into a memory budget.

    `revnet.memory.plan` counts an update from shapes alone: `training_step` on the first batch in the precision of the
    Trainer, the backward pass, and the optimizer of `configure_optimizers`. Then the callback sets the policies, prints
    them as one line, and gives loggers the predicted peak as `planned_peak_bytes`. Nothing else of the run changes: the
    weights are the same to the last bit as with the same policies set by hand.

    What `training_step` logs, and its torchmetrics, are left out while it is counted. It must not read values of
    tensors in another way, such as `loss.item()`.

    Lightning keeps the gradients of an update during the next forward pass. The callback frees them before, unless the
    module overrides `optimizer_zero_grad`. With gradient accumulation, and with DDP, which copies gradients into
    buckets, one more set of gradients is counted in full, so that the peak is an upper bound.

    A checkpoint holds the plan, and a resumed run has the same policies, as long as the budget is the same. Several
    processes have one plan, for the smallest of their budgets and the largest of their first batches, counted in bytes.

    Args:
        budget: Most bytes of tensors in a process: "16GiB", "500MB", or a number of bytes. On a GPU, leave room for
            memory outside tensors.
        blocks: Blocks that receive policies, as in `revnet.nn.add_policies`. None plans the units that the module has,
            such as reversible blocks, or else the blocks that it repeats.
        policies: Policies to choose from, or their names, as in `revnet.memory.plan`.

    Raises:
        TypeError: `budget` is not a string or an integer, or an entry of `policies` is not a policy.
        ValueError: `budget` is not a number of bytes; or, at the first batch, the module has no units.
        BudgetError: At the first batch: no plan fits.
        PredictionError: At the first batch: `training_step` needs the values of tensors.
        NotImplementedError: The module optimizes manually or is compiled, or the strategy divides it among processes.
    """

    def __init__(
        self,
        budget: str | int,
        *,
        blocks: Any = None,
        policies: Sequence[AbstractPolicy | str] | None = None,
    ) -> None:
        self._budget_bytes = parse_bytes(budget)
        self._blocks = blocks
        self._policies = None if policies is None else _checked(policies)
        self._common_bytes = self._budget_bytes
        self._rows: list[Row] | None = None
        self._rows_bytes: int | None = None
        self._is_set = False
        self._planned_module: weakref.ref[LightningModule] | None = None
        self.plan: Plan | None = None
        """Plan that was made in this process, with a table of all units; None before the first batch, and in the
        processes that received the plan of another one."""
        self.planned_peak_bytes: int | None = None
        """Predicted peak of an update; None before the first batch."""

    def state_dict(self) -> dict[str, Any]:
        """Return the plan."""
        return {"budget_bytes": self._common_bytes, "rows": self._rows, "planned_peak_bytes": self.planned_peak_bytes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the plan. Training begins with it unless it was made for another budget."""
        self._rows, self._rows_bytes, self._planned_module = state_dict["rows"], state_dict["budget_bytes"], None
        self.planned_peak_bytes = state_dict["planned_peak_bytes"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what can be planned, and set the policies of a resumed run."""
        _check_trainer(trainer, pl_module)
        self._is_set = False
        self._common_bytes = min(_gathered(trainer, self._budget_bytes))
        is_other = self._planned_module is not None and self._planned_module() is not pl_module
        if is_other or self._rows_bytes != self._common_bytes:
            self._rows = self.plan = self.planned_peak_bytes = None
        self._prepare_units(pl_module)
        if self._rows is not None:
            set_rows(pl_module, self._rows)
            self._is_set = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Free the gradients of the last update; at the first batch, make the plan and set its policies."""
        if _can_zero(pl_module) and batch_idx % trainer.accumulate_grad_batches == 0:
            for optimizer in trainer.optimizers:
                optimizer.zero_grad()
        if self._is_set:
            return
        sizes = _gathered(trainer, _nbytes(batch))
        planner = sizes.index(max(sizes))
        message, error = "", None
        if trainer.global_rank == planner:
            try:
                message = self._make_plan(trainer, pl_module, batch, batch_idx)
            except Exception as caught:
                error = caught
        # An error is raised in all processes, which would otherwise wait for the one that plans.
        chosen = (self._rows, self.planned_peak_bytes, message, _sent(error))
        self._rows, self.planned_peak_bytes, message, sent_error = trainer.strategy.broadcast(chosen, src=planner)
        if sent_error is not None:
            raise error or sent_error
        assert self._rows is not None
        assert self.planned_peak_bytes is not None
        rank_zero_info(message)
        for logger in trainer.loggers:
            logger.log_metrics({"planned_peak_bytes": self.planned_peak_bytes}, step=trainer.global_step)
        set_rows(pl_module, self._rows)
        self._is_set, self._planned_module = True, weakref.ref(pl_module)
        self._rows_bytes = self._common_bytes

    def _prepare_units(self, pl_module: LightningModule) -> None:
        """Give policies to the chosen blocks or, in a module without units, to the blocks that it repeats."""
        if self._blocks is not None or not policy_holders(pl_module):
            add_policies(pl_module, self._blocks)

    def _make_plan(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> str:
        """Make the plan of this process, and return its description."""
        step = SilentStep(pl_module, batch_idx, trainer.precision_plugin.train_step_context)
        step.training = pl_module.training  # The modes of the modules inside stay as they are.
        reserved = _other_gradient_bytes(trainer, pl_module)
        try:
            with unmetered():
                self.plan = plan(
                    step,
                    batch,
                    budget=max(1, self._common_bytes - reserved),
                    optimizer=trainer.optimizers[0] if trainer.optimizers else None,
                    loss=_identity,
                    policies=self._policies,
                )
        except BudgetError as error:
            raise self._budget_error(error, reserved) from error
        except PredictionError as error:
            cause = (
                str(error)
                .replace(SilentStep.__name__, type(pl_module).__name__)
                .partition("; measure it")[0]
                .rstrip(".")
            )
            raise PredictionError(
                f"`MemoryBudget` cannot count the first batch: {cause}; take that out of `training_step`, or set the "
                "policies yourself with `revnet.set_policy`."
            ) from error
        self._rows = rows_of(self.plan, _PREFIX)
        self.planned_peak_bytes = self.plan.peak_bytes + reserved
        more = f", and {format_bytes(reserved)} for other gradients" if reserved else ""
        return f"MemoryBudget: {describe_plan(self.plan)}{more}"

    def _budget_error(self, error: BudgetError, reserved: int) -> BudgetError:
        """Return the error in terms of the whole budget."""
        size = error.max_batch_size
        way_out = f"pass a batch size of {size} or less" if size else "no batch would fit; pass a smaller model"
        least = error.least_bytes + reserved
        return BudgetError(
            f"`budget` (={format_bytes(self._common_bytes)}) is {format_bytes(least - self._common_bytes)} below the "
            f"least that an update needs, {format_bytes(least)}; {way_out}, or a larger budget.",
            missing_bytes=least - self._common_bytes,
            least_bytes=least,
            max_batch_size=size,
        )


def _checked(policies: Sequence[AbstractPolicy | str]) -> list[AbstractPolicy]:
    if isinstance(policies, str) or not isinstance(policies, Sequence):
        raise TypeError(f"`policies` (={policies!r}) must be a sequence of policies, such as `[Reverse(), Store()]`.")
    return [as_policy(policy, f"policies[{index}]") for index, policy in enumerate(policies)]


def _check_trainer(trainer: Trainer, pl_module: LightningModule) -> None:
    if not pl_module.automatic_optimization:
        raise NotImplementedError(
            f"`MemoryBudget` cannot count the updates of {type(pl_module).__name__}, which optimizes manually; use "
            "`revnet.memory.plan` in the module itself."
        )
    if pl_module._compiler_ctx is not None:
        raise NotImplementedError(
            f"`MemoryBudget` cannot count {type(pl_module).__name__}, which is compiled as a whole; compile modules "
            "inside it instead, or plan without `torch.compile`."
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise NotImplementedError(
            f"`MemoryBudget` does not support {type(trainer.strategy).__name__}, only one device and DDP; use "
            "`revnet.memory.predict_distributed` for sharded models."
        )


def _can_zero(pl_module: LightningModule) -> bool:
    return not is_overridden("optimizer_zero_grad", pl_module)


def _other_gradient_bytes(trainer: Trainer, pl_module: LightningModule) -> int:
    """Return the bytes of gradients that are alive in addition to the ones of the step that `plan` counts."""
    gradient_bytes = sum(parameter.nbytes for parameter in pl_module.parameters() if parameter.requires_grad)
    steps = [trainer.accumulate_grad_batches]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            steps += callback.scheduling.values()
    num_sets = int(max(steps) > 1 or not _can_zero(pl_module))
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy) and strategy.world_size > 1:
        num_sets += not strategy._ddp_kwargs.get("gradient_as_bucket_view", False)
    return num_sets * gradient_bytes


def _gathered(trainer: Trainer, value: int) -> list[int]:
    """Return the value of each process."""
    if trainer.world_size == 1:
        return [value]
    values = [value] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def _sent(error: Exception | None) -> Exception | None:
    """Return an error that pickle can send to another process."""
    if error is None or type(error).__module__ in ("builtins", "revnet.errors"):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")


def _nbytes(batch: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor))


def _identity(loss: torch.Tensor) -> torch.Tensor:
    return loss
