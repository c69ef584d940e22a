"""What every result file opens with: the hardware, the versions, the date and the command."""

import datetime
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import revnet

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Provenance:
    """The head of a result file, without the names of its entries."""

    hardware: str
    versions: str
    date: str
    command: str

    @classmethod
    def parse(cls, lines: Sequence[str]) -> "Provenance":
        """Read the lines that `describe_machine` wrote."""
        entries = dict(line.removeprefix("- ").split(": ", 1) for line in lines)
        return cls(entries["Hardware"], entries["Versions"], entries["Date"], entries["Command"].strip("`"))


def describe_machine(command: str, *, device: torch.device = _CPU, peers: Mapping[str, str] | None = None) -> list[str]:
    """Lines of Markdown.

    Args:
        command: What was run, without the environment.
        device: Where it ran.
        peers: Further packages and their versions.
    """
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    others = "".join(f", {name} {version}" for name, version in (peers or {}).items())
    return [
        f"- Hardware: {os.cpu_count()} cores of {_processor_name()}, threads used: {torch.get_num_threads()}, "
        f"{accelerator}",
        f"- Versions: PyTorch {torch.__version__}, Python {platform.python_version()}, revnet {_revision()}{others}",
        f"- Date: {datetime.date.today()}",
        f"- Command: `{prefix}{command}`",
    ]


def hardware_name(device: torch.device = _CPU) -> str:
    """The hardware in a file name: "cpu2", "nvidia-h200"."""
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return f"cpu{os.cpu_count()}"


def process_peak_bytes(device: torch.device = _CPU) -> int | None:
    """The most memory that this process ever had: resident on the CPU, by PyTorch's allocator on a GPU.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_bytes(device: torch.device = _CPU) -> int | None:
    """Memory that a process could still take, on a GPU or of the host; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    match = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return None if match is None else 1024 * int(match[1])


def _revision() -> str:
    """The commit of a source checkout, marked if files have changed since; the version of an installed package."""
    folder = Path(revnet.__file__).parent
    if _git(folder, "ls-files", "__init__.py"):  # not some other repository around an installed package
        return f"at commit {_git(folder, 'describe', '--always', '--dirty', '--exclude', '*')}"
    return revnet.__version__


def _git(folder: Path, *arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=folder).stdout.strip()
    except FileNotFoundError:
        return ""


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
