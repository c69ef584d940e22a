"""A plan: a policy for each unit of a model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from revnet.memory.planning._chunked_loss import chunk_loss
from revnet.memory.planning._plan_plot import plot_plan
from revnet.memory.planning._plan_report import comparison_lines, total_lines, unit_lines
from revnet.memory.planning._planned_unit import PlannedUnit, PlanPoint
from revnet.memory.planning._timing import Timing
from revnet.memory.planning._units import set_policies
from revnet.memory.step._step_memory import StepMemory
from revnet.nn._whole_model import policy_holders


@dataclass(frozen=True)
class Plan:
    """A policy for each unit of a model, with its costs and the alternatives.

    `apply` sets the policies of a model. `print` shows the plan as a table. If `step_in_backward` is true, the plan
    fits only with `revnet.optim.StepInBackward`.
    """

    budget_bytes: int
    memory: StepMemory
    """Memory of a step under the plan, as `predict` returns it."""
    time_ratio: float
    """Time of the step, relative to a step that stores all activations."""
    units: tuple[PlannedUnit, ...] = field(repr=False)
    """Units in the order in which they run."""
    unplanned: tuple[str, ...] = field(repr=False)
    """Names of the other units, which keep their policies: they do not run exactly once, or contain other units."""
    points: tuple[PlanPoint, ...] = field(repr=False)
    """Best plans from the least memory to the least time: each faster one needs more memory.

    The peaks of the first point, of this plan and of the references are predictions of a whole step. The other peaks
    are sums of the costs of units, and may be off by a few percent.
    """
    references: Mapping[str, PlanPoint] = field(repr=False)
    """Policies to compare with: all activations stored ("plain autograd"), or one policy everywhere ("reverse all").

    A unit that does not accept the policy has the next one.
    """
    is_exact: bool
    """Whether `points` are complete; if a model has very many different units, some points are left out."""
    timing: Timing
    step_in_backward: bool
    """Whether the optimizer's step must run in the backward pass: train with `revnet.optim.StepInBackward`."""
    chunked_loss: bool | None
    """Whether the loss works on some rows of logits at a time; None if the plan leaves the model's head as it is."""

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes alive at once in a step under the plan, everything counted."""
        return self.memory.peak_bytes

    def apply(self, model: nn.Module) -> None:
        """Set the policies of `model`, and `chunked_loss`: the planned model, or one of the same structure.

        Raises:
            ValueError: The model does not have these units.
        """
        holders = policy_holders(model)
        for unit in self.units:
            if unit.holder not in holders or unit.index >= len(holders[unit.holder].policies):
                raise ValueError(
                    f"`model` (={type(model).__name__}) has no unit `{unit.name}`, for which the plan has a policy; "
                    "pass a model of the same structure, after `revnet.nn.add_policies` if that made the units."
                )
        set_policies(model, {(unit.holder, unit.index): unit.policy for unit in self.units})
        if self.chunked_loss is not None:
            chunk_loss(model, self.chunked_loss)

    def plot(self, path: Path, *, title: str) -> None:
        """Draw time against memory for the best plans, this plan and the references.

        Args:
            path: PNG file to write.
            title: Title of the picture, such as "RevNet-110, batch 128".

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        chosen = PlanPoint(self.peak_bytes, self.time_ratio)
        plot_plan(self.points, chosen, self.references, path, title=title, budget_bytes=self.budget_bytes)

    def report(self) -> str:
        """Return the plan as text: the total, the policy of each unit with its costs, and the references."""
        lines = [
            *total_lines(
                self.budget_bytes,
                self.memory.at_peak,
                self.time_ratio,
                self.timing,
                step_in_backward=self.step_in_backward,
                chunked_loss=self.chunked_loss,
            ),
            "",
            *unit_lines(self.units, self.unplanned),
            "",
            *comparison_lines(self.references, self.points, self.budget_bytes),
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.report()
