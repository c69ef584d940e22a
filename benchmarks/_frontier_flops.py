"""The FLOPs of a step with and without kept operators, counted by PyTorch, for `frontier.py`."""

from collections.abc import Sequence

import torch
from _frontier_variants import OWN, PYTORCH, STORED, WORKLOADS
from _memory_page import table
from torch.utils.flop_counter import FlopCounterMode

from revnet.bench._runner import Runner


def flops_section(names: Sequence[str], depth: int) -> list[str]:
    """Return the section with the FLOPs of every variant of this library and of PyTorch."""
    lines = [
        "## FLOPs of a step",
        "",
        "Counted by `torch.utils.flop_counter.FlopCounterMode`, in units of the stored twin's forward pass. The twin's",
        "step has 3; running every operator again would make 4.",
        "",
    ]
    for name in names:
        case = WORKLOADS[name]
        functions = case.functions(depth, torch.device("cpu"))
        stored = Runner(STORED, case, functions, torch.device("cpu"))
        forward = flops_of(stored, backward=False)
        rows = []
        for method in (STORED, *OWN[name], *PYTORCH[name]):
            flops = flops_of(Runner(method, case, functions, torch.device("cpu")))
            rows.append([method.name, f"{flops / 1e9:.2f}", f"{flops / forward:.3f}"])
        lines += table((f"{name}, {depth} blocks", "GFLOP", "over forward"), rows)
    return lines


def flops_of(runner: Runner, *, backward: bool = True) -> int:
    """Return the FLOPs of a forward pass, and of the backward pass if wanted."""
    x = runner.fresh_input()
    with FlopCounterMode(display=False) as counter:
        loss = runner.loss(x)
        if backward:
            loss.backward()
    return int(counter.get_total_flops())
