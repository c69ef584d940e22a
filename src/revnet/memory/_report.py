"""The memory of a step as a table of text."""

from dataclasses import fields
from typing import TYPE_CHECKING

from revnet._text_table import aligned
from revnet.memory._bytes import format_bytes

if TYPE_CHECKING:
    from revnet.memory._step_memory import CudaMemory, StepMemory

_LABELS = {
    "optimizer": "optimizer state",
    "held": "activations, held",
    "transient": "activations, transient",
}


def report_lines(memory: "StepMemory", depth: int) -> list[str]:
    """The total and what it is of, then the modules down to `depth`, then what a GPU said."""
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
        raise ValueError(f"`depth` (={depth!r}) must be a number of levels of modules, 0 or more.")
    at = f", in `{memory.peak_module}`" if memory.peak_module else ""
    lines = [f"peak {format_bytes(memory.peak_bytes)}, {_PASSES[memory.peak_phase]}{at}", ""]
    rows = [("at the peak", "", "")]
    for part in fields(memory.at_peak):
        num_bytes = getattr(memory.at_peak, part.name)
        if num_bytes:
            share = f"{100 * num_bytes / memory.peak_bytes:.0f} %"
            rows.append((f"  {_LABELS.get(part.name, part.name)}", format_bytes(num_bytes), share))
    rows += [
        ("activations alone, at most", format_bytes(memory.activation_bytes), ""),
        ("held between the passes", format_bytes(memory.held_bytes), ""),
    ]
    lines += aligned(rows, num_left=1)
    table: list[tuple[str, ...]] = [("module", "kind", "parameters", "held", "peak")]
    for module in memory.modules:
        level = module.name.count(".") + 1 if module.name else 0
        if level <= depth and (module.peak_bytes or module.parameter_bytes):
            sizes = (module.parameter_bytes, module.held_bytes, module.peak_bytes)
            table.append((module.name or "(the model)", module.kind, *map(format_bytes, sizes)))
    lines += ["", *aligned(table, num_left=2)]
    if memory.cuda is not None:
        lines += ["", *_cuda_lines(memory, memory.cuda)]
    return lines


_PASSES = {
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer's step",
}


def _cuda_lines(memory: "StepMemory", cuda: "CudaMemory") -> list[str]:
    rows = [
        ("counted, tensors of this step", format_bytes(memory.peak_bytes)),
        ("allocated, by this process", format_bytes(cuda.allocated_bytes)),
        ("reserved, by PyTorch's allocator", format_bytes(cuda.reserved_bytes)),
        ("in use on the device", format_bytes(cuda.device_bytes)),
    ]
    return [
        "on the GPU",
        *aligned([(f"  {label}", value) for label, value in rows], num_left=1),
        "Allocated is counted, plus workspaces of kernels, rounding to 512 bytes, and other tensors of this process;",
        "less the optimizer, whose state and step are counted by shapes and were not run.",
        "Reserved is allocated, plus what the allocator keeps for later: freed blocks, and gaps too small to use.",
        "In use is reserved, plus CUDA's context, the kernels of the libraries, and other processes.",
    ]
