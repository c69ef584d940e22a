"""The header of result files: hardware, versions, date and command."""

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import revnet
from revnet._hardware import accelerator_name, processor_name

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Provenance:
    """The header of a result file, without the names of its entries."""

    hardware: str
    versions: str
    date: str
    command: str

    @classmethod
    def parse(cls, lines: Sequence[str]) -> "Provenance":
        """Read the lines that `describe_machine` wrote.

        Raises:
            ValueError: An entry is missing.
        """
        entries = {name: text for name, _, text in (line.removeprefix("- ").partition(": ") for line in lines)}
        missing = [name for name in ("Hardware", "Versions", "Date", "Command") if name not in entries]
        if missing:
            raise ValueError(f"`lines` lack the entry `{missing[0]}`; pass what `describe_machine` returned.")
        return cls(entries["Hardware"], entries["Versions"], entries["Date"], entries["Command"].strip("`"))


def describe_machine(command: str, *, device: torch.device = _CPU, peers: Mapping[str, str] | None = None) -> list[str]:
    """Return the hardware, the versions, the date and the command as a Markdown list with one line for each.

    Args:
        command: The command that produced the results, without environment variables.
        device: Device of the measurements.
        peers: Names and versions of other packages that were measured.
    """
    accelerator = "no GPU" if device.type in ("cpu", "meta") else accelerator_name(device)
    others = "".join(f", {name} {version}" for name, version in (peers or {}).items())
    return [
        f"- Hardware: {os.cpu_count()} cores of {processor_name()}, threads used: {torch.get_num_threads()}, "
        f"{accelerator}",
        f"- Versions: PyTorch {torch.__version__}, Python {platform.python_version()}, revnet {_revision()}{others}",
        f"- Date: {datetime.date.today()}",
        f"- Command: `{with_environment(command)}`",
    ]


def with_environment(command: str) -> str:
    """Return a command with the environment variables that change its results."""
    threads = os.environ.get("OMP_NUM_THREADS")
    return f"OMP_NUM_THREADS={threads} {command}" if threads else command


def _revision() -> str:
    """Return the commit of a source checkout, marked if files have changed, or the version of an installed package."""
    folder = Path(revnet.__file__).parent
    # An installed package may be inside another repository, which does not track its files.
    if _git(folder, "ls-files", "__init__.py"):
        return f"at commit {_git(folder, 'describe', '--always', '--dirty', '--exclude', '*')}"
    return revnet.__version__


def _git(folder: Path, *arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=folder).stdout.strip()
    except FileNotFoundError:
        return ""
