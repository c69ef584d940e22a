"""The settings of how PyTorch executes a run."""

from dataclasses import dataclass
from typing import ClassVar

from revnet.training.settings.choices import Compile
from revnet.training.settings.fields import SettingsGroup


@dataclass(frozen=True, kw_only=True)
class ExecutionSettings(SettingsGroup):
    """Settings of how PyTorch executes a run."""

    title: ClassVar[str] = "execution"

    compile: Compile = "off"
    """What to compile with `torch.compile`: nothing (off), the residual functions (functions), or these and the whole
    network around them in one graph (model; with the `strategy` fsdp2, one graph for each block). The first updates
    take longer."""

    cuda_graphs: bool = False
    """Whether to capture the forward and backward pass in a CUDA graph, on one GPU, which makes updates of small
    networks faster. Batches of another size, such as the last one of an epoch, run without it. Experimental: written,
    not run on a GPU."""

    deterministic: bool = False
    """Whether to use deterministic algorithms only, so that a run on a GPU can be repeated bit for bit. PyTorch raises
    an error for an operation that has none."""

    profile: bool = False
    """Whether to record some updates with PyTorch's profiler. The run writes a trace (`profile.json`), which
    https://ui.perfetto.dev opens, and prints the operators that take the longest."""
