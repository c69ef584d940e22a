"""Format the parts of a plan as lines of text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from revnet._bytes import format_bytes
from revnet._text_table import aligned
from revnet.memory.planning._planned_unit import PlannedUnit, PlanPoint
from revnet.memory.planning._timing import Timing
from revnet.memory.step._memory_parts import Breakdown
from revnet.nn import AbstractPolicy, Reverse


def total_lines(
    budget_bytes: int,
    at_peak: Breakdown,
    time_ratio: float,
    timing: Timing,
    *,
    step_in_backward: bool,
    chunked_loss: bool | None,
) -> list[str]:
    """Return a table of budget, peak and time of the whole step."""
    activations = format_bytes(at_peak.held + at_peak.transient)
    rows = [
        ("budget", format_bytes(budget_bytes), ""),
        ("peak", format_bytes(at_peak.total), f"of which activations {activations}"),
        ("step time", f"{time_ratio:.3f}", f"relative to plain autograd, {timing.describe()}"),
    ]
    if step_in_backward:
        rows.append(("optimizer", "StepInBackward", "its step runs in the backward pass"))
    if chunked_loss:
        rows.append(("loss", "chunked", "its logits exist for some rows at a time"))
    return aligned(rows, num_left=3)


def unit_lines(units: Iterable[PlannedUnit], unplanned: Sequence[str] = ()) -> list[str]:
    """Return a table of the units, in which a run of equal units has one row, and the names of other units."""
    table = [("units", "policy", "holds", "stored, would hold", "adds to the step", "storing saves, per MiB")]
    for run in _runs(units):
        first = run[0]
        table.append(
            (
                _names(run),
                describe_policy(first.policy),
                format_bytes(first.held_bytes),
                format_bytes(first.stored_bytes),
                f"{100 * first.extra_time:.2f} %",
                _saving(first),
            )
        )
    others = f"{len(unplanned)} units, such as {unplanned[0]}," if len(unplanned) > 1 else "".join(unplanned)
    verbs = "keep their policies, since they do" if len(unplanned) > 1 else "keeps its policy, since it does"
    return [
        *aligned(table, num_left=2),
        *([f"{others} {verbs} not run exactly once in a step"] if unplanned else []),
        "",
        "All figures are per unit. A unit holds its bytes until the backward pass reaches it, and the plan stores",
        "activations first where that saves the most time per MiB. No faster mix of these policies is known to fit.",
    ]


def comparison_lines(references: Mapping[str, PlanPoint], points: Sequence[PlanPoint], budget_bytes: int) -> list[str]:
    """Return a table of the references, of the plan with the least memory, and of the next faster plan."""
    compared = {**references, "least memory": points[0]}
    faster = [point for point in points if point.peak_bytes > budget_bytes]
    if faster:
        compared["next faster plan"] = faster[0]
    rows = [("for comparison", "peak", "step time")]
    rows += [(name, format_bytes(point.peak_bytes), f"{point.time_ratio:.3f}") for name, point in compared.items()]
    return aligned(rows, num_left=1)


def describe_policy(policy: AbstractPolicy) -> str:
    """Return a policy as a short expression that makes it."""
    if type(policy) is not Reverse:
        return str(policy)
    given = {"hold": policy.hold, "keep": policy.keep}
    arguments = [f"{name}={_joined(value)}" for name, value in given.items() if value != ()]
    return f"Reverse({', '.join(arguments)})"


def _joined(entries: Any) -> str:
    """Return names with commas between them, or the representation of something else."""
    if isinstance(entries, tuple) and all(isinstance(entry, str) for entry in entries):
        return f'"{",".join(entries)}"'
    return repr(entries)


def _runs(units: Iterable[PlannedUnit]) -> list[list[PlannedUnit]]:
    """Divide the units into runs of equal ones, whose numbers follow each other if they have their own policies."""
    runs: list[list[PlannedUnit]] = []
    for unit in units:
        last = runs[-1][-1] if runs else None
        if last is not None and _figures(last) == _figures(unit) and _is_next(last, unit):
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return runs


def _figures(unit: PlannedUnit) -> tuple[object, ...]:
    return (unit.policy, unit.held_bytes, unit.stored_bytes, round(unit.extra_time, 5))


def _is_next(unit: PlannedUnit, other: PlannedUnit) -> bool:
    """Return whether the other unit has the same holder, or a name with the next number."""
    (prefix, _, number), (other_prefix, _, other_number) = [each.name.rpartition(".") for each in (unit, other)]
    is_numbered = number.isdecimal() and other_number.isdecimal() and prefix == other_prefix
    return unit.holder == other.holder or (is_numbered and int(other_number) == int(number) + 1)


def _names(run: Sequence[PlannedUnit]) -> str:
    first, last = run[0].name, run[-1].name
    return first if len(run) == 1 else f"{first} to {last.rpartition('.')[2]}"


def _saving(unit: PlannedUnit) -> str:
    """Return the time that storing the unit saves, per MiB that it takes."""
    if unit.most_extra_time <= 0 or not unit.stored_bytes:
        return "-"
    percent = 100 * unit.most_extra_time * 2**20 / unit.stored_bytes
    return f"{percent:.3f} %" if percent >= 0.001 else f"{percent:.1e} %"
