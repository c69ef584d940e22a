"""A policy for every unit of a model, such that a training step fits a budget and takes as little time as it can."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from revnet._memory_readings import free_bytes
from revnet.errors import BudgetError
from revnet.memory._bytes import format_bytes, parse_bytes
from revnet.memory._costs import CountedCosts, count_costs
from revnet.memory._optimizer import OptimizerFactory
from revnet.memory._plan_report import plan_lines
from revnet.memory._plot import plot_plan
from revnet.memory._predict import Prediction, predicting
from revnet.memory._search import ChainCosts, FrontierPoint, find_frontier
from revnet.memory._step import Loss, device_of, tensors_in
from revnet.memory._step_memory import StepMemory
from revnet.memory._timing import CountedTiming, MeasuredTiming, measure_seconds, num_samples
from revnet.memory._units import Unit, assign, find_units, set_policies
from revnet.nn import AbstractPolicy, Checkpoint, Reverse, Store, as_policy
from revnet.nn._restore import restoring_policies

POLICIES: tuple[AbstractPolicy, ...] = (Reverse(), Checkpoint(), Store())
"""What a plan chooses from, from the least memory to the most."""
_MOST_BYTES = 2**53
"""Of a budget that a batch is sought for: beyond it, what a step does cannot be counted in 64 bits."""


class PlanPoint(NamedTuple):
    """A way to run the step."""

    peak_bytes: int
    """Most bytes alive at once, everything counted."""
    time_ratio: float
    """Time of the step, relative to that with all activations stored."""


@dataclass(frozen=True)
class PlannedUnit:
    """What a plan does with one unit, and why."""

    name: str
    """Where it is in the model."""
    holder: str
    """The name of the module that holds its policy."""
    index: int
    """Which of the holder's units it is."""
    policy: AbstractPolicy
    held_bytes: int
    """What it holds between the passes under this policy."""
    stored_bytes: int
    """What it would hold with all its activations stored."""
    extra_time: float
    """What the policy costs, as a share of the step with all activations stored."""
    most_extra_time: float
    """What the dearest of its policies would cost."""


@dataclass(frozen=True)
class Plan:
    """A policy for each unit of a model, what that comes to, and what else there was to choose from.

    Print it for a table; `apply` gives the policies to a model.
    """

    budget_bytes: int
    memory: StepMemory
    """The memory of the step under the plan, as `predict` has it."""
    time_ratio: float
    """Time of the step, relative to that with all activations stored."""
    units: tuple[PlannedUnit, ...] = field(repr=False)
    """In the order in which they run."""
    points: tuple[PlanPoint, ...] = field(repr=False)
    """The whole range, from the least memory to the least time: whatever is faster needs more memory. The peaks of the
    least, of the plan and of the references are predicted as a whole; those between are put together from what each
    unit costs, which may be a few percent off."""
    references: Mapping[str, PlanPoint] = field(repr=False)
    """For comparison: everything stored ("plain autograd"), and one policy everywhere ("reverse all"); a unit that does
    not take it has the next."""
    is_exact: bool
    """Whether `points` are all there are; with very many different units they are thinned out."""
    timing: CountedTiming | MeasuredTiming

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once in a step under the plan, everything counted."""
        return self.memory.peak_bytes

    def apply(self, model: nn.Module) -> None:
        """Give the policies to `model`: the one that was planned for, or one that is built alike.

        Raises:
            ValueError: The model has no such units.
        """
        set_policies(model, {(unit.holder, unit.index): unit.policy for unit in self.units})

    def plot(self, path: Path, *, title: str) -> None:
        """Draw time against memory for the whole range, the plan, and what it is compared with.

        Args:
            path: The PNG file to write.
            title: What was planned: "RevNet-110, batch 128".

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        plot_plan(
            self.points,
            ("this plan", self.peak_bytes, self.time_ratio),
            [(name, *point) for name, point in self.references.items()],
            path,
            title=title,
            budget_bytes=self.budget_bytes,
        )

    def report(self) -> str:
        """The plan as text: what it comes to, which units have which policy, and why."""
        return "\n".join(plan_lines(self))

    def __str__(self) -> str:
        return self.report()


def plan(
    model: nn.Module,
    *inputs: Any,
    budget: str | int,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: OptimizerFactory | Optimizer | None = None,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    policies: Sequence[AbstractPolicy | str] = POLICIES,
    timing: CountedTiming | MeasuredTiming | None = None,
) -> Plan:
    """Choose a policy for each unit of `model`, such that a training step fits a budget in the least time.

    Units are the blocks of `ReversibleSequential`, a `PolicySequential`, and the blocks of this library's networks.
    Late ones often store cheaply and recompute dearly, early ones the other way round. What each costs under each
    policy is counted on fake tensors; of all mixtures, those that none beats in both memory and time are found by an
    exact dynamic program; the fastest one within the budget is predicted once more, as a whole. More budget never gives
    a slower plan, and no plan exceeds its budget.

    The model is left as it was: `plan(...).apply(model)` gives it the policies.

    Args:
        model: A model with reversible sequences, or one of this library.
        inputs: Its arguments: real tensors, or tensors on the meta device.
        budget: Most bytes that a step may need, everything counted: "16GiB", "500MB", or a number of bytes. On a GPU,
            leave room for what is no tensor: its context, workspaces of kernels, gaps between tensors.
        kwargs: As for `predict`.
        optimizer: As for `predict`.
        loss: As for `predict`.
        autocast: As for `predict`.
        dtype: As for `predict`.
        device: As for `predict`.
        policies: Policies that units may have, or their names, from the least memory to the most. A unit takes the
            policies that it accepts. `Store()` is always added.
        timing: How time is known: `CountedTiming()` from shapes, the default; `MeasuredTiming()` by running steps.

    Raises:
        BudgetError: No plan fits. It says how much is missing, and which batch would fit.
        PredictionError: The model fails on fake tensors.
        ValueError: `budget` is no number of bytes, or the model has no units to plan.
        TypeError: An argument is of another kind than said above.
    """
    budget_bytes = parse_bytes(budget)
    timing = CountedTiming() if timing is None else timing
    if not isinstance(timing, CountedTiming | MeasuredTiming):
        raise TypeError(f"`timing` (={timing!r}) must be a `CountedTiming()` or a `MeasuredTiming()`.")
    allowed = _checked(policies)
    step = _Step(model, inputs, dict(kwargs or {}), optimizer, loss, autocast, dtype, device)
    with restoring_policies(model):
        with step.predicted() as prediction:
            units, (costs, excess_bytes) = _count(step, prediction, allowed, timing)
        if isinstance(timing, MeasuredTiming):
            costs = replace(costs, seconds=_measure(step, units, costs, timing))
        frontier = find_frontier(costs)
        with step.predicted() as prediction:

            def predict_with(point: FrontierPoint) -> StepMemory:
                assign(step.model, units, _policies(units, point.choices))
                return prediction.memory()

            # One policy everywhere is no better than the frontier; but there, peaks are those that were seen.
            references = _uniform(units, costs)
            candidates = [*frontier.points, *references.values()]
            point, memory = _fastest_within(budget_bytes, candidates, excess_bytes, predict_with)
            if point is None:
                raise _too_small(step, budget_bytes, memory)
            references = {name: _with_peak(each, predict_with(each)) for name, each in references.items()}
            least = _with_peak(frontier.points[0], predict_with(frontier.points[0]))
    known = [least, *references.values(), _with_peak(point, memory)]
    points = _undominated({each.choices: each for each in [*frontier.points, *known]}.values())
    return _plan(units, costs, points, references, point, memory, budget_bytes, timing, is_exact=frontier.is_exact)


def max_batch_size(
    model: nn.Module,
    *inputs: Any,
    budget: str | int,
    kwargs: Mapping[str, Any] | None = None,
    optimizer: OptimizerFactory | Optimizer | None = None,
    loss: Loss | None = None,
    autocast: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> int:
    """Find the largest batch of which a training step fits a budget, with the policies that `model` has.

    By prediction alone. All tensors of the inputs that have as many samples along their first dimension as the first
    one are taken for parts of the batch. `plan` tells the largest batch under the policies that need the least memory,
    where its own does not fit.

    Args:
        model: As for `predict`.
        inputs: Its arguments, for any batch size.
        budget: Most bytes that a step may need, everything counted: "16GiB", "500MB", or a number of bytes.
        kwargs: As for `predict`.
        optimizer: As for `predict`.
        loss: As for `predict`. It is called with outputs of every batch size that is tried.
        autocast: As for `predict`.
        dtype: As for `predict`.
        device: As for `predict`.

    Returns:
        The number of samples; 0 if not even one fits. A budget of more than 8 PiB is taken for 8 PiB.

    Raises:
        PredictionError: The model fails on fake tensors.
        ValueError: `budget` is no number of bytes, or the inputs have no tensor.
    """
    budget_bytes = min(parse_bytes(budget), _MOST_BYTES)
    return _largest_batch(
        _Step(model, inputs, dict(kwargs or {}), optimizer, loss, autocast, dtype, device), budget_bytes
    )


class _Step(NamedTuple):
    """A training step that is planned."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    optimizer: OptimizerFactory | Optimizer | None
    loss: Loss | None
    autocast: torch.dtype | None
    dtype: torch.dtype | None
    device: torch.device | str | None

    def predicted(self) -> AbstractContextManager[Prediction]:
        """Fake tensors in the place of the real ones."""
        return predicting(
            self.model,
            self.args,
            self.kwargs,
            optimizer=self.optimizer,
            loss=self.loss,
            autocast=self.autocast,
            dtype=self.dtype,
            device=self.device,
        )

    def with_batch(self, count: int) -> "_Step":
        """The same step on `count` samples, of which only the shapes are known."""
        total = num_samples(self.args, self.kwargs)

        def resize(tensor: Tensor) -> Tensor:
            if not tensor.dim() or tensor.shape[0] != total:
                return tensor
            return torch.empty((count, *tensor.shape[1:]), dtype=tensor.dtype, device="meta")

        args, kwargs = tree_map_only(Tensor, resize, (self.args, self.kwargs))
        device = self.device or device_of(self.model, self.args, self.kwargs)
        return self._replace(args=args, kwargs=kwargs, device=device)


def _checked(policies: Sequence[AbstractPolicy | str]) -> tuple[AbstractPolicy, ...]:
    if isinstance(policies, str) or not isinstance(policies, Sequence):
        raise TypeError(f"`policies` (={policies!r}) must be a sequence of policies, such as `[Reverse(), Store()]`.")
    chosen = [as_policy(policy, f"policies[{index}]") for index, policy in enumerate(policies)]
    if not chosen:
        raise ValueError("`policies` must hold one policy or more, such as `[Reverse(), Store()]`.")
    # What times are relative to, and last, where the most memory is.
    return (*[policy for policy in chosen if policy != Store()], Store())


def _count(
    step: _Step, prediction: Prediction, policies: Sequence[AbstractPolicy], timing: CountedTiming | MeasuredTiming
) -> tuple[list[Unit], CountedCosts]:
    units = find_units(step.model, policies, prediction.run().log)
    if not units:
        raise ValueError(
            f"`model` (={type(step.model).__name__}) has no units to plan; build it of `ReversibleSequential`, or wrap "
            "what is not reversible in `PolicySequential`s."
        )
    memory = prediction.memory()
    constant_bytes = memory.parameter_bytes + memory.buffer_bytes + memory.input_bytes + memory.optimizer_bytes
    later = slice(memory.timeline.optimizer_start, None)
    in_optimizer = memory.timeline.activation_bytes[later] + memory.timeline.gradient_bytes[later]
    counted = timing if isinstance(timing, CountedTiming) else CountedTiming()
    counted_costs = count_costs(
        step.model,
        units,
        prediction.run,
        counted.seconds,
        constant_bytes=constant_bytes,
        floor=constant_bytes + int(in_optimizer.max(initial=0)),
    )
    return units, counted_costs


def _measure(step: _Step, units: Sequence[Unit], costs: ChainCosts, timing: MeasuredTiming) -> list[Any]:
    """The seconds of all units, by the clock."""
    for tensor in tensors_in(step.args, step.kwargs, list(step.model.parameters())):
        if tensor.is_meta:
            raise ValueError(
                "`timing` (=MeasuredTiming) runs steps, but the model or its inputs are on the meta device, without "
                "data; pass real ones, or `CountedTiming()`."
            )
    total = num_samples(step.args, step.kwargs)
    stored = costs.peak([0, *[len(unit.choices) - 1 for unit in units]])
    free = free_bytes(device_of(step.model, step.args, step.kwargs))
    # Not all that is free: what is no tensor needs some, and another process may take more.
    usable = None if free is None else free * 4 // 5
    most_samples = total if usable is None or stored <= usable else total * usable // stored
    if not most_samples:
        raise BudgetError(
            f"`timing` (=MeasuredTiming) runs steps with all activations stored, but not one of {total} samples fits "
            f"four fifths of the {format_bytes(free or 0)} that are free; use `CountedTiming()`, or smaller inputs."
        )
    kinds = [
        tuple(part.tobytes() for part in (held, transient - transient.min(), seconds))
        for held, transient, seconds in zip(costs.held, costs.transient, costs.seconds, strict=True)
    ]
    return measure_seconds(
        step.model,
        units,
        step.args,
        step.kwargs,
        loss=step.loss,
        autocast=step.autocast,
        num_rounds=timing.num_rounds,
        kinds=kinds,
        most_samples=most_samples,
    )


def _policies(units: Sequence[Unit], choices: Sequence[int]) -> list[AbstractPolicy]:
    """The policies of a point of the frontier, whose first choice is that of what lies before the first unit."""
    return [unit.choices[choice] for unit, choice in zip(units, choices[1:], strict=True)]


def _fastest_within(
    budget_bytes: int,
    points: Sequence[FrontierPoint],
    excess_bytes: int,
    predict_with: Callable[[FrontierPoint], StepMemory],
) -> tuple[FrontierPoint | None, StepMemory]:
    """The fastest point that fits, and its memory; without one, that of the least, whose policies the model then has.

    Points are tried by falling speed until the prediction of one, as a whole, is within the budget; from a little above
    it on, since their own peaks may err upwards. A larger budget has all the points of a smaller one to choose from, so
    it never gives a slower plan.
    """
    least_peak = min(point.peak_bytes for point in points)
    fitting = [point for point in points if point.peak_bytes <= max(budget_bytes, least_peak) + excess_bytes]
    tried = []
    for point in sorted(fitting, key=lambda point: point.seconds):
        memory = predict_with(point)
        if memory.peak_bytes <= budget_bytes:
            return point, memory
        tried.append((memory.peak_bytes, point))
    _, least = min(tried, key=lambda each: each[0])
    return None, predict_with(least)


def _with_peak(point: FrontierPoint, memory: StepMemory) -> FrontierPoint:
    return replace(point, peak_bytes=memory.peak_bytes)


def _undominated(points: Iterable[FrontierPoint]) -> list[FrontierPoint]:
    """Those of which none else is both faster and smaller, from the least memory to the least time."""
    best: list[FrontierPoint] = []
    for point in sorted(points, key=lambda point: (point.peak_bytes, point.seconds)):
        if not best or point.seconds < best[-1].seconds:
            best.append(point)
    return best


def _too_small(step: _Step, budget_bytes: int, least: StepMemory) -> BudgetError:
    """Say how much is missing, and what would fit; the model has the policies that need least."""
    total = num_samples(step.args, step.kwargs)
    fitting = _largest_batch(step, budget_bytes, most=total - 1)
    missing = least.peak_bytes - budget_bytes
    samples = "sample" if fitting == 1 else "samples"
    way_out = f"a batch of {fitting} {samples} in place of {total} would fit" if fitting else "no batch would fit"
    fixed = least.parameter_bytes + least.optimizer_bytes + least.gradient_bytes
    return BudgetError(
        f"`budget` (={format_bytes(budget_bytes)}) is {format_bytes(missing)} below the least that this step needs, "
        f"{format_bytes(least.peak_bytes)}, of which {format_bytes(fixed)} are parameters, their gradients and "
        f"optimizer state; {way_out}.",
        missing_bytes=missing,
        least_bytes=least.peak_bytes,
        max_batch_size=fitting,
    )


def _largest_batch(step: _Step, budget_bytes: int, most: int | None = None) -> int:
    """The largest batch, up to `most`, that fits with the policies as they are; 0 if none does.

    The peak grows with the batch nearly in a line, so the line through what is known is followed, between bounds.
    """
    if not tensors_in(step.args, step.kwargs):
        raise ValueError("`inputs` hold no tensor, so there is no batch to change; pass the model's inputs.")
    known: dict[int, int] = {}

    def fits(count: int) -> bool:
        with step.with_batch(count).predicted() as prediction:
            known[count] = prediction.memory().peak_bytes
        return known[count] <= budget_bytes

    low, high = 0, None if most is None else most + 1
    guess = min(num_samples(step.args, step.kwargs), most or 2**62)
    while high is None or high - low > 1:
        if fits(guess):
            low = guess
        else:
            high = guess
        guess = _next_guess(known, budget_bytes, low, high)
    return low


def _next_guess(known: Mapping[int, int], budget_bytes: int, low: int, high: int | None) -> int:
    """Where the line through the two nearest known peaks meets the budget, between what fits and what does not."""
    if len(known) == 1:
        ((count, peak),) = known.items()
        guess = count * 2 if peak <= budget_bytes else count // 2
    else:
        (count1, peak1), (count2, peak2) = sorted(known.items(), key=lambda item: abs(item[1] - budget_bytes))[:2]
        slope = (peak2 - peak1) / (count2 - count1)
        guess = count1 + math.floor((budget_bytes - peak1) / slope) if slope > 0 else low * 2
        if guess in known:  # The batch beside it decides.
            guess += 1 if guess == low else -1
    most = low * 64 + 64 if high is None else high - 1
    return max(low + 1, min(guess, most))


def _plan(
    units: Sequence[Unit],
    costs: ChainCosts,
    points: Sequence[FrontierPoint],
    references: Mapping[str, FrontierPoint],
    point: FrontierPoint,
    memory: StepMemory,
    budget_bytes: int,
    timing: CountedTiming | MeasuredTiming,
    *,
    is_exact: bool,
) -> Plan:
    stored = [0, *[len(unit.choices) - 1 for unit in units]]
    plain = costs.time(stored)
    planned = []
    for place, unit in enumerate(units, start=1):
        choice = point.choices[place]
        after = [*point.choices, 0][place + 1]
        seconds = costs.seconds[place]
        planned.append(
            PlannedUnit(
                name=unit.name,
                holder=unit.holder,
                index=unit.index,
                policy=unit.choices[choice],
                held_bytes=int(costs.held[place][choice, after]),
                stored_bytes=int(costs.held[place][-1, -1]),
                extra_time=float(seconds[choice] - seconds[-1]) / plain,
                most_extra_time=float(seconds.max() - seconds[-1]) / plain,
            )
        )
    return Plan(
        budget_bytes=budget_bytes,
        memory=memory,
        time_ratio=point.seconds / plain,
        units=tuple(planned),
        points=tuple(PlanPoint(each.peak_bytes, each.seconds / plain) for each in points),
        references={name: PlanPoint(each.peak_bytes, each.seconds / plain) for name, each in references.items()},
        is_exact=is_exact,
        timing=timing,
    )


def _uniform(units: Sequence[Unit], costs: ChainCosts) -> dict[str, FrontierPoint]:
    """One policy everywhere, for each; a unit that does not accept it has its next, as in the probes."""
    most = max(len(unit.choices) for unit in units)
    longest = next(unit for unit in units if len(unit.choices) == most)
    points = {}
    for choice, policy in enumerate(longest.choices):
        choices = (0, *[max(0, choice - (most - len(unit.choices))) for unit in units])
        name = "plain autograd" if policy == Store() else f"{type(policy).__name__.lower()} all"
        points[name] = FrontierPoint(costs.peak(choices), costs.time(choices), choices)
    return points
