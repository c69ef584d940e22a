"""Time and memory of plans, predicted and measured, for `frontier.py`."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from _frontier_variants import STORED
from _memory_page import mib, table
from torch import Tensor, nn

from revnet import BudgetError, ReversibleBlock, ReversibleSequential
from revnet.bench._runner import Runner
from revnet.bench.cases import Case, FunctionPair
from revnet.bench.methods import Method
from revnet.memory import MeasuredTiming, Plan, RooflineTiming, measure, plan

SHARES = {"a third": 1 / 3, "half": 0.5, "two thirds": 2 / 3}
"""Shares of the activations of the stored twin that plans may use."""
TIMINGS = {"timed": MeasuredTiming(num_rounds=3), "roofline": RooflineTiming()}


class Setting(Protocol):
    """A workload in one precision."""

    workload: str
    precision: str

    @property
    def case(self) -> Case: ...

    @property
    def autocast(self) -> torch.dtype | None: ...


TimeInTurns = Callable[[Any, Sequence[Method], int, int], Sequence[Any]]


def plans_section(settings: Sequence[Setting], depth: int, num_rounds: int, time_in_turns: TimeInTurns) -> list[str]:
    """Return the section that compares plans with measurements of them."""
    lines = [
        "## Plans",
        "",
        f"The plans of `revnet.memory.plan` for {depth} blocks and a share of the bytes of the stored twin.",
        "*Planned* is the time that the plan predicts, as a ratio to the stored twin: with `MeasuredTiming`, which",
        "times steps, or with the default `RooflineTiming`, which estimates them from shapes. *Measured* is the median",
        f"ratio of processor time over {num_rounds} rounds, with all plans and the twin interleaved. The counted bytes",
        "of each step equal the planned ones; the script stops if they do not.",
        "",
    ]
    errors: dict[str, list[float]] = {timing: [] for timing in TIMINGS}
    for setting in settings:
        rows = []
        for name, share, planned, measured in measured_plans(setting, depth, num_rounds, time_in_turns):
            timing = "timed" if isinstance(planned.timing, MeasuredTiming) else "roofline"
            errors[timing].append(measured / planned.time_ratio - 1)
            rows.append(
                [
                    name,
                    timing,
                    f"{mib(planned.memory.activation_bytes)}",
                    f"{share:.0%}",
                    f"{planned.time_ratio:.3f}",
                    f"{measured:.3f}",
                    f"{errors[timing][-1]:+.1%}",
                ]
            )
        columns = ("share", "timing", "MiB", "of the twin", "planned", "measured", "difference")
        lines += [f"{setting.workload}, {setting.precision}:", "", *table(columns, rows)]
    for timing, own in errors.items():
        largest = max(map(abs, own), default=0.0)
        lines.append(f"- {timing}: {len(own)} plans, the largest difference {largest:.1%}")
    return [*lines, ""]


def measured_plans(
    setting: Setting, depth: int, num_rounds: int, time_in_turns: TimeInTurns
) -> list[tuple[str, float, Plan, float]]:
    """Return the share, its fraction of the twin's bytes, the plan, and the measured ratio of each plan that exists."""
    functions = setting.case.functions(depth, torch.device("cpu"))
    stored = Runner(STORED, setting.case, functions, torch.device("cpu"))
    twin = counted(stored, setting)
    plans = []
    for name, share in SHARES.items():
        for timing in TIMINGS.values():
            budget = twin.peak_bytes - twin.activation_bytes + int(share * twin.activation_bytes)
            try:
                plans.append((name, planned_step(setting, functions, stored, budget, timing)))
            except BudgetError:
                continue
    methods = [planned_method(f"{name}, {plan.timing.describe()}", plan) for name, plan in plans]
    for method, (_, planned) in zip(methods, plans, strict=True):
        memory = counted(Runner(method, setting.case, functions, torch.device("cpu")), setting)
        if memory.peak_bytes != planned.peak_bytes:
            raise RuntimeError(
                f"{setting}, {method.name}: counted {memory.peak_bytes:,} bytes, planned {planned.peak_bytes:,}"
            )
    first, *others = time_in_turns(setting, [STORED, *methods], depth, num_rounds)
    return [
        (
            name,
            planned.memory.activation_bytes / twin.activation_bytes,
            planned,
            statistics.median(own / base for own, base in zip(outcome.seconds, first.seconds, strict=True)),
        )
        for (name, planned), outcome in zip(plans, others, strict=True)
    ]


def planned_step(setting: Setting, functions: Sequence[FunctionPair], stored: Runner, budget: int, timing: Any) -> Plan:
    """Return the plan of a step."""
    blocks = [ReversibleBlock(f, g, split_dim=setting.case.split_dim) for f, g in functions]
    model = ReversibleSequential(*blocks)
    x = stored.fresh_input()
    return plan(model, x, budget=budget, loss=loss_of(setting), autocast=setting.autocast, timing=timing)


def planned_method(name: str, planned: Plan) -> Method:
    """Return the variant whose blocks have the policies of a plan."""

    def make(functions: Sequence[FunctionPair], split_dim: int) -> nn.Module:
        model = ReversibleSequential(*[ReversibleBlock(f, g, split_dim=split_dim) for f, g in functions])
        planned.apply(model)
        return model

    return Method(name, name, make)


def counted(runner: Runner, setting: Setting) -> Any:
    """Return the counted memory of a step."""
    x = runner.fresh_input()
    if setting.autocast is not None:  # the first step may check a function by running it again
        measure(runner.module, x, loss=loss_of(setting), autocast=setting.autocast)
    return measure(runner.module, x, loss=loss_of(setting), autocast=setting.autocast)


def loss_of(setting: Setting) -> Callable[[Tensor], Tensor]:
    """Return the loss of a workload."""
    weights = torch.cat(setting.case.streams(2), setting.case.split_dim)
    return lambda y: (y * weights).sum()
