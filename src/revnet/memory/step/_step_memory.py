"""Memory of a training step, the result of `measure` and `predict`."""

from dataclasses import asdict, dataclass, field

from revnet._bytes import format_bytes
from revnet._text_table import aligned
from revnet.memory.step._memory_parts import Breakdown, CudaMemory, ModuleMemory, Phase, Timeline
from revnet.memory.step._step_report import breakdown_rows, cuda_lines, module_lines, peak_line


@dataclass(frozen=True)
class StepMemory:
    """Memory of one training step: the peak, what it consists of, and the module where it occurs.

    All figures are bytes of tensors. `print` shows them as a table.
    """

    peak_bytes: int
    """Largest number of bytes alive at once: model, inputs, activations, gradients and optimizer state."""
    at_peak: Breakdown
    """Bytes alive at the peak, by kind."""
    peak_phase: Phase
    """Part of the step in which the peak occurs."""
    peak_module: str
    """Name of the module that runs at the peak; "" for the model itself, the loss and the optimizer."""
    activation_bytes: int
    """Largest number of bytes of activations and their gradients alive at once.

    A step needs these bytes in addition to the model, its parameters' gradients and its inputs. If the optimizer's
    step runs in the backward pass, its temporaries count.
    """
    held_bytes: int
    """Activations alive between the forward and the backward pass: tensors that autograd saved, and the loss."""
    parameter_bytes: int
    buffer_bytes: int
    gradient_bytes: int
    """Gradients of all parameters after the backward pass; 0 if the optimizer's step runs in it."""
    optimizer_bytes: int
    """State that the optimizer keeps from step to step; 0 if no optimizer was given."""
    input_bytes: int
    modules: tuple[ModuleMemory, ...] = field(repr=False)
    """Memory of each module, in the order of the model's `named_modules`."""
    timeline: Timeline = field(repr=False, compare=False)
    cuda: CudaMemory | None = field(default=None, compare=False)
    """Memory that the GPU reported; None unless the step was measured on one."""

    def report(self, *, depth: int = 2) -> str:
        """Return the figures as a table.

        Args:
            depth: Levels of modules to list: 0 for only the model, 1 for its children too.
        """
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 0:
            raise ValueError(f"`depth` (={depth!r}) must be a number of levels of modules, 0 or more.")
        rows = [
            *breakdown_rows(asdict(self.at_peak)),
            ("activations alone, at most", format_bytes(self.activation_bytes), ""),
            ("held between the passes", format_bytes(self.held_bytes), ""),
        ]
        lines = [peak_line(self.peak_bytes, self.peak_phase, self.peak_module), "", *aligned(rows, num_left=1)]
        lines += ["", *module_lines(self.modules, depth)]
        if self.cuda is not None:
            lines += ["", *cuda_lines(self.peak_bytes, self.cuda)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.report()
