"""The settings of devices and arithmetic."""

from dataclasses import dataclass
from typing import ClassVar

from revnet.training.settings.choices import Device, Precision
from revnet.training.settings.fields import SettingsGroup, integer


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(SettingsGroup):
    """Settings of devices and arithmetic."""

    title: ClassVar[str] = "devices"

    device: Device = "auto"
    """Device to train on; `auto` takes the GPU if there is one."""

    precision: Precision = "32-true"
    """Arithmetic: `32-true`, or `bf16-mixed` for autocast to bfloat16."""

    num_threads: int | None = integer(None, at_least=1)
    """Threads on the CPU; null is PyTorch's choice."""
