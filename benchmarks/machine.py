"""What every result file opens with: the hardware, the versions, the date and the command."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def describe_machine(command: str) -> list[str]:
    """Lines of Markdown; `command` is what was run, without the environment."""
    revision = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
    return [
        f"- Hardware: {os.cpu_count()} cores of {_processor_name()}, threads used: {torch.get_num_threads()}, no GPU",
        f"- Versions: PyTorch {torch.__version__}, Python {platform.python_version()}, revnet at commit "
        f"{revision.stdout.strip()}",
        f"- Date: {datetime.date.today()}",
        f"- Command: `{prefix}{command}`",
    ]


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
