"""Format the parts of a step's memory as lines of text."""

from collections.abc import Iterable, Mapping

from revnet._bytes import format_bytes
from revnet._text_table import aligned
from revnet.memory.step._memory_parts import CudaMemory, ModuleMemory, Phase

_LABELS = {
    "optimizer": "optimizer state",
    "held": "activations, held",
    "transient": "activations, transient",
    "communication": "gathered parameters, buckets",
}
WHEN: dict[Phase, str] = {
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer's step",
}
"""The parts of a step, in words."""


def peak_line(peak_bytes: int, phase: Phase, module: str) -> str:
    """Return a line that says how high the peak is, and when and where it occurs."""
    where = f", in `{module}`" if module else ""
    return f"peak {format_bytes(peak_bytes)}, {WHEN[phase]}{where}"


def breakdown_rows(at_peak: Mapping[str, int]) -> list[tuple[str, str, str]]:
    """Return a heading, and one row of cells for each kind of bytes at the peak."""
    rows = [("at the peak", "", "")]
    total = sum(at_peak.values())
    for kind, num_bytes in at_peak.items():
        if num_bytes:
            share = 100 * num_bytes / total
            percent = f"{share:.0f} %" if share >= 0.5 else "<1 %"
            rows.append((f"  {_LABELS.get(kind, kind)}", format_bytes(num_bytes), percent))
    return rows


def module_lines(modules: Iterable[ModuleMemory], depth: int) -> list[str]:
    """Return a table of the modules down to `depth` levels below the model."""
    rows: list[tuple[str, ...]] = [("module", "kind", "parameters", "held", "peak")]
    for module in modules:
        level = module.name.count(".") + 1 if module.name else 0
        if level <= depth and (module.peak_bytes or module.parameter_bytes):
            sizes = (module.parameter_bytes, module.held_bytes, module.peak_bytes)
            rows.append((module.name or "(the model)", module.kind, *map(format_bytes, sizes)))
    return aligned(rows, num_left=2)


def cuda_lines(counted_bytes: int, cuda: CudaMemory) -> list[str]:
    """Return a table of the figures that the GPU reported, and how they relate to the counted bytes."""
    rows = [
        ("counted, tensors of this step", format_bytes(counted_bytes)),
        ("allocated, by this process", format_bytes(cuda.allocated_bytes)),
        ("reserved, by PyTorch's allocator", format_bytes(cuda.reserved_bytes)),
        ("in use on the device", format_bytes(cuda.device_bytes)),
    ]
    return [
        "on the GPU",
        *aligned([(f"  {label}", value) for label, value in rows], num_left=1),
        "Allocated: the counted bytes, kernel workspaces, rounding to 512 bytes, and other tensors of this process.",
        "The optimizer is counted from shapes and did not run, so allocated does not include it.",
        "Reserved: the allocated bytes, and memory that the allocator keeps: freed blocks, and gaps too small to use.",
        "In use: the reserved bytes, CUDA's context, the kernels of the libraries, and other processes.",
    ]
