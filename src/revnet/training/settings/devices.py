"""The settings of devices and arithmetic."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from revnet.training.settings.checks import check_integer
from revnet.training.settings.choices import Device, Precision, Strategy
from revnet.training.settings.fields import SettingsGroup, checked, integer


def explain_device(name: str, value: Any) -> str | None:
    """Return which setting a value of `device` or `devices` is meant for, if it is meant for the other one.

    Args:
        name: Name of the setting.
        value: Its value, or its text on the command line.
    """
    text = str(value)
    if name == "device" and text.isdecimal():
        return f"`device` (={value}) is the kind of device; the number of devices is `--devices {text}`."
    if name == "device" and text.partition(":")[0] == "cuda" and ":" in text:
        index = text.partition(":")[2]
        return (
            f"`device` (={value}) is the kind of device; pass `--device cuda`, and set the environment variable "
            f"CUDA_VISIBLE_DEVICES={index} to use that GPU only."
        )
    if name == "devices" and text.partition(":")[0] in ("cpu", "cuda", "gpu", "mps"):
        kind = "cuda" if text.startswith("gpu") else text.partition(":")[0]
        return f"`devices` (={value}) is the number of devices; the kind of device is `--device {kind}`."
    return None


def check_device_kind(name: str, value: Any) -> None:
    """Raise if the value is meant for `devices`."""
    hint = explain_device(name, value)
    if hint is not None:
        raise ValueError(hint)


def check_num_devices(name: str, value: Any) -> None:
    """Raise unless the value is `auto` or a positive integer."""
    check_device_kind(name, value)
    if value != "auto":
        check_integer(name, value, at_least=1)


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(SettingsGroup):
    """Settings of devices and arithmetic."""

    title: ClassVar[str] = "devices"

    device: Device = checked("auto", check_device_kind)  # noqa: RUF009 - it returns a field
    """Kind of device to train on; `auto` takes the GPU if there is one."""

    devices: int | Literal["auto"] | None = checked(None, check_num_devices)
    """Number of devices on each node, each with a process of its own; `auto` takes all GPUs. They divide each batch of
    `batch_size`. By default, the processes that torchrun or SLURM has started, or one device."""

    num_nodes: int | None = integer(None, at_least=1)
    """Number of machines, on each of which torchrun or SLURM starts this command; by default, the number that it has
    started on."""

    strategy: Strategy = "auto"
    """Division of the model among several devices: `ddp` keeps all of it on each device; `fsdp2` divides parameters,
    gradients and optimizer state, one reversible block at a time; `auto` is ddp. Activations are divided with the batch
    in both."""

    sync_batch_norm: bool = False
    """Whether batch norms use the statistics of the whole batch on several GPUs; otherwise each device normalizes its
    part of the batch by itself. Experimental: it has not been tested on several GPUs."""

    precision: Precision = "32-true"
    """Arithmetic: `32-true`, or `bf16-mixed` for autocast to bfloat16. With the `strategy` fsdp2, `bf16-mixed` gathers
    the parameters in bfloat16, and streams stay in float32."""

    num_threads: int | None = integer(None, at_least=1, at_most=4096)
    """Threads on the CPU, of each process; by default, PyTorch's choice."""
