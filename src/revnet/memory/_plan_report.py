"""A plan as text: what it comes to, which units have which policy, and why."""

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from revnet._text_table import aligned
from revnet.memory._bytes import format_bytes

if TYPE_CHECKING:
    from revnet.memory._plan import Plan, PlannedUnit


def plan_lines(plan: "Plan") -> list[str]:
    """The total, the units in runs of those alike, and what else there was to choose from."""
    peak = plan.memory.at_peak
    fixed = peak.total - peak.held - peak.transient
    how = "timed" if type(plan.timing).__name__ == "MeasuredTiming" else "estimated from shapes"
    rows = [
        ("budget", format_bytes(plan.budget_bytes), ""),
        ("peak", format_bytes(plan.peak_bytes), f"of which activations {format_bytes(peak.total - fixed)}"),
        ("step time", f"{plan.time_ratio:.3f}", f"relative to plain autograd, {how}"),
    ]
    lines = [*aligned(rows, num_left=3), ""]
    table = [("units", "policy", "holds", "stored, would hold", "adds to the step", "storing saves, per MiB")]
    for _, group in groupby(plan.units, _kind):
        run = list(group)
        first = run[0]
        table.append(
            (
                _names(run),
                str(first.policy),
                format_bytes(first.held_bytes),
                format_bytes(first.stored_bytes),
                f"{100 * first.extra_time:.2f} %",
                _saving(first),
            )
        )
    lines += aligned(table, num_left=2)
    lines += [
        "",
        "Figures are of each unit. Storing is done first where it saves most per MiB; what a unit holds counts until",
        "the backward pass has come back to it. No mixture of these policies that fits is known to be faster.",
        "",
        *_others(plan),
    ]
    return lines


def _others(plan: "Plan") -> list[str]:
    """The range that the plan was chosen from, and one policy everywhere."""
    rows = [("for comparison", "peak", "step time")]
    for name, point in plan.references.items():
        rows.append((name, format_bytes(point.peak_bytes), f"{point.time_ratio:.3f}"))
    faster = [point for point in plan.points if point.peak_bytes > plan.budget_bytes]
    least = plan.points[0]
    rows.append(("least memory", format_bytes(least.peak_bytes), f"{least.time_ratio:.3f}"))
    if faster:
        rows.append(("next faster plan", format_bytes(faster[0].peak_bytes), f"{faster[0].time_ratio:.3f}"))
    return aligned(rows, num_left=1)


def _kind(unit: "PlannedUnit") -> tuple[object, ...]:
    return (unit.holder, unit.policy, unit.held_bytes, unit.stored_bytes, round(unit.extra_time, 5))


def _names(run: Sequence["PlannedUnit"]) -> str:
    first, last = run[0].name, run[-1].name
    return first if len(run) == 1 else f"{first} to {last.rpartition('.')[2]}"


def _saving(unit: "PlannedUnit") -> str:
    """What storing the unit saves of a step, for the memory that it takes."""
    if unit.most_extra_time <= 0 or not unit.stored_bytes:
        return "-"
    return f"{100 * unit.most_extra_time * 2**20 / unit.stored_bytes:.3f} %"
