"""Choose a policy for each unit of a model, so that a training step fits a budget and takes as little time as possible.

1. A step runs on fake tensors under several mixtures of policies, which shows the memory and time of every unit under
   every policy (`_costs`). With `MeasuredTiming`, real steps give the times (`_unit_seconds`).
   `Reverse()` gets variants that hold streams and keep outputs of operators (`_variants`, `_variant_costs`).
2. A dynamic program finds the mixtures that no other one beats in both memory and time (`_search`). Equal units then
   get equal choices in a row (`_tidy`).
3. Its peaks are sums over units and may be slightly too high. So the candidates near the budget are predicted as whole
   steps, by falling speed, until one fits.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from revnet._bytes import format_bytes, parse_bytes
from revnet.errors import BudgetError, PredictionError
from revnet.memory.planning._chunked_loss import check_has_head, chunking_loss
from revnet.memory.planning._costs import CountedCosts, count_costs
from revnet.memory.planning._max_batch_size import largest_batch
from revnet.memory.planning._plan import Plan
from revnet.memory.planning._plan_report import describe_policy
from revnet.memory.planning._planned_unit import PlannedUnit, PlanPoint
from revnet.memory.planning._search import ChainCosts, FrontierPoint, find_frontier, undominated
from revnet.memory.planning._tidy import tidied
from revnet.memory.planning._timing import MeasuredTiming, RooflineTiming, Timing
from revnet.memory.planning._training_step import TrainingStep
from revnet.memory.planning._unit_seconds import measure_seconds
from revnet.memory.planning._units import UnitInModel, assign, find_units, find_unplanned, other_units
from revnet.memory.repeats._frame import NotRepeatedError
from revnet.memory.repeats._short_step import ShortSteps, block_kinds, find_short_steps
from revnet.memory.step._backward_optimizer import check_step_in_backward
from revnet.memory.step._optimizer import OptimizerFactory, as_factory
from revnet.memory.step._predict import Prediction
from revnet.memory.step._run_step import Loss
from revnet.memory.step._step_memory import StepMemory
from revnet.nn import AbstractPolicy, Checkpoint, Reverse, Store
from revnet.nn._cross_entropy_head import cross_entropy_heads
from revnet.nn._restore import restoring_policies
from revnet.nn.policies._has_policies import as_policy

POLICIES: tuple[AbstractPolicy, ...] = (Reverse(), Checkpoint(), Store())
"""Policies that a plan chooses from by default, from the least memory to the most."""


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
    policies: Sequence[AbstractPolicy | str] | None = None,
    timing: Timing | None = None,
    step_in_backward: bool | Literal["auto"] = False,
    chunked_loss: bool | Literal["auto"] | None = None,
) -> Plan:
    """Choose a policy for each unit of `model`, so that a training step fits a budget in the least time.

    Units are the blocks of a `ReversibleSequential`, a `PolicySequential`, and the blocks of this library's networks.
    Late units often store cheaply and are slow to recompute; early ones are the opposite. The memory and time of every
    unit under every policy are counted on fake tensors. An exact dynamic program then finds the mixtures that no other
    one beats in both memory and time, and the fastest that fits the budget is predicted once more as a whole. A larger
    budget never gives a slower plan, and no plan exceeds its budget.

    Equal blocks count once: a model with 1,000 of them is planned in seconds, from a few blocks, with the same plan.

    The policies of the model are left unchanged; `plan(...).apply(model)` sets them.

    Args:
        model: A model with reversible sequences, or one of this library.
        inputs: Arguments of the model: real tensors, or tensors on the meta device.
        budget: Most bytes that a step may need, everything counted: "16GiB", "500MB", or a number of bytes. On a GPU,
            leave room for memory outside tensors: the context, workspaces of kernels, and fragmentation.
        kwargs: See `predict`.
        optimizer: See `predict`.
        loss: See `predict`.
        autocast: See `predict`.
        dtype: See `predict`.
        device: See `predict`.
        policies: Policies to choose from, or their names, from the least memory to the most. A unit uses the ones that
            it accepts. `Store()` is always added. By default, `Reverse()`, `Checkpoint()` and `Store()`; the plan then
            also chooses `hold` and `keep` of `Reverse` for each unit.
        timing: Source of the times: `RooflineTiming()` estimates them from shapes and is the default,
            `MeasuredTiming()` runs steps.
        step_in_backward: Whether the optimizer's step runs in the backward pass, by `revnet.optim.StepInBackward`. With
            "auto", the plan chooses it if that makes a faster plan fit; `Plan.step_in_backward` holds the choice. A
            step in the backward pass needs less memory if the gradients are large, and a little more if the stored
            activations are.
        chunked_loss: Whether the loss works on some rows of logits at a time, for a model that passes its targets to a
            `revnet.nn.CrossEntropyHead`. With "auto", the plan chooses it if that makes a faster plan fit;
            `Plan.chunked_loss` holds the choice, which `Plan.apply` sets. None leaves the head as it is.

    Raises:
        BudgetError: No plan fits. The error says how much memory is missing, and which batch size would fit.
        PredictionError: The model fails on fake tensors.
        ValueError: `budget` is not a number of bytes, the model has no units to plan, `step_in_backward` has no
            optimizer, or `chunked_loss` has no head.
        TypeError: An argument has the wrong type.
    """
    budget_bytes = parse_bytes(budget)
    timing = RooflineTiming() if timing is None else timing
    if not isinstance(timing, RooflineTiming | MeasuredTiming):
        raise TypeError(f"`timing` (={timing!r}) must be a `RooflineTiming()` or a `MeasuredTiming()`.")
    allowed = _Allowed(POLICIES, True) if policies is None else _Allowed(_check_policies(policies), False)
    _check_choices(step_in_backward=step_in_backward, chunked_loss=chunked_loss)
    check_step_in_backward(bool(step_in_backward), optimizer)
    if chunked_loss is not None:
        check_has_head(model)
    if isinstance(optimizer, Optimizer) and isinstance(model, nn.Module):
        # The search looks at batches of other sizes while fake parameters stand for the ones that it holds.
        optimizer = as_factory(optimizer, list(model.parameters()))
    step = TrainingStep(model, inputs, dict(kwargs or {}), optimizer, loss, autocast, dtype, device)
    results = [
        _plan_step(replace(step, step_in_backward=stepping, chunked_loss=chunking), budget_bytes, allowed, timing)
        for chunking in ((False, True) if chunked_loss == "auto" else (chunked_loss,))
        for stepping in ((False, True) if step_in_backward == "auto" else (step_in_backward,))
    ]
    outcomes = [result for result in results if isinstance(result, _Outcome)]
    if not outcomes:
        errors = [result.error for result in results if isinstance(result, _Failure)]
        raise min(errors, key=lambda error: error.least_bytes)
    fastest = min(outcomes, key=lambda outcome: outcome.chosen.seconds)
    # All of them are compared with the first one, which is an ordinary step if the plan may choose.
    return _make_plan(fastest, budget_bytes, timing, stored_seconds=results[0].stored_seconds)


def _check_choices(**choices: bool | str | None) -> None:
    for name, value in choices.items():
        if not isinstance(value, bool) and value != "auto" and not (name == "chunked_loss" and value is None):
            raise ValueError(f"`{name}` (={value!r}) must be True, False or 'auto'.")


def _plan_step(step: TrainingStep, budget_bytes: int, allowed: "_Allowed", timing: Timing) -> "_Outcome | _Failure":
    short = find_short_steps(step.model)
    try:
        return _plan_with(short, step, budget_bytes, allowed, timing)
    except NotRepeatedError:  # The steps so far may be wrong. From now on, all blocks run.
        return _plan_with(None, step, budget_bytes, allowed, timing)


def _plan_with(
    short: ShortSteps | None,
    step: TrainingStep,
    budget_bytes: int,
    allowed: "_Allowed",
    timing: Timing,
) -> "_Outcome | _Failure":
    with restoring_policies(step.model), chunking_loss(step.model, step.chunked_loss):
        with step.predicted(short) as prediction:
            units, costs, excess_bytes, variants = _count_costs(step, prediction, allowed, timing, block_kinds(short))
        if isinstance(timing, MeasuredTiming):
            costs = replace(costs, seconds=measure_seconds(step, units, costs, variants, timing))
        frontier = find_frontier(costs)
        stored_seconds = costs.time([0, *[len(unit.choices) - 1 for unit in units]])
        best = tidied(costs, frontier.points)
        with step.predicted(short) as prediction:

            def predict_with(point: FrontierPoint) -> StepMemory:
                assign(step.model, units, _policies_at(point, units))
                return prediction.memory()

            # One policy everywhere never beats the frontier, but its peak was observed, not added up.
            references = _uniform_points(units, costs)
            candidates = [*best, *references.values()]
            point, memory = _fastest_within(budget_bytes, candidates, excess_bytes, predict_with)
            if point is None:
                return _Failure(stored_seconds, _budget_error(step, budget_bytes, memory))
            references = {name: _with_peak(other, predict_with(other)) for name, other in references.items()}
            least = _with_peak(best[0], predict_with(best[0]))
    point = _with_peak(point, memory)
    # A predicted peak replaces the sum for the same choices.
    by_choices = {other.choices: other for other in [*best, least, *references.values(), point]}
    points = undominated(by_choices.values())
    return _Outcome(stored_seconds, step, units, costs, points, references, point, memory, frontier.is_exact)


@dataclass(frozen=True)
class _Allowed:
    """Policies to choose from."""

    policies: tuple[AbstractPolicy, ...]
    with_variants: bool
    """Whether the plan also chooses `hold` and `keep` of `Reverse`."""


def _check_policies(policies: Sequence[AbstractPolicy | str]) -> tuple[AbstractPolicy, ...]:
    if isinstance(policies, str) or not isinstance(policies, Sequence):
        raise TypeError(f"`policies` (={policies!r}) must be a sequence of policies, such as `[Reverse(), Store()]`.")
    chosen = [as_policy(policy, f"policies[{index}]") for index, policy in enumerate(policies)]
    if not chosen:
        raise ValueError("`policies` must hold one policy or more, such as `[Reverse(), Store()]`.")
    # Store() comes last, as it takes the most memory; all times are relative to it.
    return (*[policy for policy in chosen if policy != Store()], Store())


def _count_costs(
    step: TrainingStep,
    prediction: Prediction,
    allowed: "_Allowed",
    timing: Timing,
    kinds: Mapping[tuple[str, int], Hashable],
) -> CountedCosts:
    log = prediction.run().log
    units = find_units(step.model, allowed.policies, log)
    if not units:
        raise ValueError(_no_units(step.model, find_unplanned(step.model, allowed.policies, log)))
    memory = prediction.memory()
    constant_bytes = memory.parameter_bytes + memory.buffer_bytes + memory.input_bytes + memory.optimizer_bytes
    later = slice(memory.timeline.optimizer_start, None)
    in_optimizer = memory.timeline.activation_bytes[later] + memory.timeline.gradient_bytes[later]
    roofline = timing if isinstance(timing, RooflineTiming) else RooflineTiming()
    return count_costs(
        step.model,
        units,
        prediction.run,
        roofline.seconds,
        constant_bytes=constant_bytes,
        floor=constant_bytes + int(in_optimizer.max(initial=0)),
        kinds=[kinds.get((unit.holder, unit.index), unit.name) for unit in units],
        adds_variants=allowed.with_variants,
    )


def _no_units(model: nn.Module, unplanned: Mapping[str, str]) -> str:
    """Return the message for a model of which no unit can be planned."""
    name, reason = next(iter(unplanned.items()), ("", ""))
    if not name:
        return (
            f"`model` (={type(model).__name__}) has no units to plan; build it from `ReversibleSequential`, wrap parts "
            "that are not reversible in `PolicySequential`, or name its blocks in `revnet.apply_budget`."
        )
    others = f", and {len(unplanned) - 1} others cannot be planned either" if len(unplanned) > 1 else ""
    return (
        f"`model` (={type(model).__name__}) has no units to plan: `{name}` {reason}{others}; a unit must run exactly "
        "once in a step, and contain no other unit."
    )


def _policies_at(point: FrontierPoint, units: Sequence[UnitInModel]) -> list[AbstractPolicy]:
    """Return the policy of each unit; the first choice of the point belongs to the part before the first unit."""
    return [unit.choices[choice] for unit, choice in zip(units, point.choices[1:], strict=True)]


def _uniform_points(units: Sequence[UnitInModel], costs: ChainCosts) -> dict[str, FrontierPoint]:
    """Return one point for each policy, which all units have; a unit that does not accept it has its next policy."""
    most = max(len(unit.kinds) for unit in units)
    longest = next(unit for unit in units if len(unit.kinds) == most)
    points = {}
    for kind, policy in enumerate(longest.kinds):
        of_units = [unit.kinds[max(0, kind - (most - len(unit.kinds)))] for unit in units]
        choices = (0, *[unit.choices.index(policy) for unit, policy in zip(units, of_units, strict=True)])
        is_plain = policy == type(policy)()
        name = f"{type(policy).__name__.lower()} all" if is_plain else f"{describe_policy(policy)} all"
        name = "plain autograd" if policy == Store() else name
        points[name] = FrontierPoint(costs.peak(choices), costs.time(choices), choices)
    return points


def _fastest_within(
    budget_bytes: int,
    points: Sequence[FrontierPoint],
    excess_bytes: int,
    predict_with: Callable[[FrontierPoint], StepMemory],
) -> tuple[FrontierPoint | None, StepMemory]:
    """Return the fastest point that fits, and its memory.

    If no point fits, return None and the memory of the smallest one, whose policies the model then has. Points are
    tried by falling speed until the prediction of a whole step is within the budget. Points up to `excess_bytes` above
    the budget are tried too, since their own peaks may be too high. A larger budget can choose from all points of a
    smaller one, so it never gives a slower plan.
    """
    least_peak = min(point.peak_bytes for point in points)
    near = [point for point in points if point.peak_bytes <= max(budget_bytes, least_peak) + excess_bytes]
    tried = []
    for point in sorted(near, key=lambda point: point.seconds):
        memory = predict_with(point)
        if memory.peak_bytes <= budget_bytes:
            return point, memory
        tried.append((memory.peak_bytes, point))
    _, smallest = min(tried, key=lambda pair: pair[0])
    return None, predict_with(smallest)


def _with_peak(point: FrontierPoint, memory: StepMemory) -> FrontierPoint:
    return replace(point, peak_bytes=memory.peak_bytes)


def _budget_error(step: TrainingStep, budget_bytes: int, least: StepMemory) -> BudgetError:
    """Return an error that says how much is missing and what would fit; the model has the policies of `least`."""
    total = step.num_samples
    # No choice and no batch size makes the model and the state of its optimizer smaller.
    is_hopeless = budget_bytes < least.parameter_bytes + least.buffer_bytes + least.optimizer_bytes
    fitting = 0 if is_hopeless else _fitting_batch(step, budget_bytes, total - 1)
    missing = least.peak_bytes - budget_bytes
    samples = "sample" if fitting == 1 else "samples"
    hint = f"a batch of {fitting} {samples} instead of {total} would fit" if fitting else "no batch would fit"
    if fitting is None:
        hint = "smaller batches fail, so none was found that fits"
    for way_out, other in () if is_hopeless else _ways_out(step):
        if _fits(other, budget_bytes):
            hint += f", but {way_out} would make it fit"
            break
    fixed = least.parameter_bytes + least.optimizer_bytes + least.gradient_bytes
    return BudgetError(
        f"`budget` (={format_bytes(budget_bytes)}) is {format_bytes(missing)} below the least that this step needs, "
        f"{format_bytes(least.peak_bytes)}, of which {format_bytes(fixed)} are parameters, their gradients and "
        f"optimizer state; {hint}.",
        missing_bytes=missing,
        least_bytes=least.peak_bytes,
        max_batch_size=fitting or 0,
    )


def _fitting_batch(step: TrainingStep, budget_bytes: int, most: int) -> int | None:
    """Return the largest batch that fits; None if the model or the loss works only for the batch size of the step."""
    try:
        return largest_batch(step, budget_bytes, most)
    except (PredictionError, TypeError, ValueError):
        return None


def _ways_out(step: TrainingStep) -> Iterator[tuple[str, TrainingStep]]:
    """Return the other choices of a plan that may make a step fit, in words and as a step."""
    if step.optimizer is not None and not step.step_in_backward:
        words = "the optimizer's step in the backward pass (`step_in_backward`)"
        yield words, replace(step, step_in_backward=True)
    if any(not head.is_chunked for head in cross_entropy_heads(step.model)):
        yield "a loss that works on some rows of logits at a time (`chunked_loss`)", replace(step, chunked_loss=True)


def _fits(step: TrainingStep, budget_bytes: int) -> bool:
    """Return whether a step fits under the policies that its model has."""
    short = find_short_steps(step.model)
    try:
        with chunking_loss(step.model, step.chunked_loss), step.predicted(short) as prediction:
            return prediction.memory().peak_bytes <= budget_bytes
    except (NotImplementedError, ValueError):  # the optimizer cannot update one parameter at a time
        return False


@dataclass(frozen=True, eq=False)
class _Failure:
    """Result of a search in which nothing fits."""

    stored_seconds: float
    error: BudgetError


@dataclass(frozen=True, eq=False)
class _Outcome:
    """Result of a search."""

    stored_seconds: float
    step: TrainingStep
    units: Sequence[UnitInModel]
    costs: ChainCosts
    points: list[FrontierPoint]
    references: dict[str, FrontierPoint]
    chosen: FrontierPoint
    memory: StepMemory
    is_exact: bool


def _make_plan(outcome: _Outcome, budget_bytes: int, timing: Timing, *, stored_seconds: float) -> Plan:
    costs = outcome.costs
    choices = outcome.chosen.choices
    planned = []
    for index, unit in enumerate(outcome.units, start=1):  # 0 is the part before the first unit
        choice = choices[index]
        next_choice = [*choices, 0][index + 1]
        seconds = costs.seconds[index]
        planned.append(
            PlannedUnit(
                name=unit.name,
                holder=unit.holder,
                index=unit.index,
                policy=unit.choices[choice],
                held_bytes=int(costs.held[index][choice, next_choice]),
                stored_bytes=int(costs.held[index][-1, -1]),
                extra_time=float(seconds[choice, next_choice] - seconds[-1, -1]) / stored_seconds,
                most_extra_time=float(seconds.max() - seconds[-1, -1]) / stored_seconds,
            )
        )

    def plan_point(point: FrontierPoint) -> PlanPoint:
        return PlanPoint(point.peak_bytes, point.seconds / stored_seconds)

    return Plan(
        budget_bytes=budget_bytes,
        memory=outcome.memory,
        time_ratio=outcome.chosen.seconds / stored_seconds,
        units=tuple(planned),
        unplanned=other_units(outcome.step.model, outcome.units),
        points=tuple(map(plan_point, outcome.points)),
        references={name: plan_point(point) for name, point in outcome.references.items()},
        is_exact=outcome.is_exact,
        timing=timing,
        step_in_backward=outcome.step.step_in_backward,
        chunked_loss=outcome.step.chunked_loss,
    )
