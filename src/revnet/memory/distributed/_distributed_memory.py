"""Memory and communication of a training step on several devices, the result of `predict_distributed`."""

from dataclasses import dataclass
from typing import Literal

from revnet.memory.distributed._device_memory import Communication, DeviceMemory
from revnet.memory.distributed._distributed_report import (
    communication_lines,
    device_lines,
    padding_lines,
    stage_lines,
)

Strategy = Literal["ddp", "fsdp2", "pipeline"]
ShardUnit = Literal["block", "function"]


@dataclass(frozen=True)
class DistributedMemory:
    """Memory and communication of one training step on several devices. `print` shows them as a table."""

    strategy: Strategy
    num_devices: int
    devices: tuple[DeviceMemory, ...]
    """One entry for all devices if they run the same program, or one entry for each stage of a pipeline."""
    communication: tuple[Communication, ...]
    """Collectives that each device calls in a step. In a pipeline, what two neighbors send each other."""
    model_bytes: int
    """Parameters of the whole model, without padding."""
    is_extrapolated: bool
    """Whether the figures follow from models with fewer blocks. They are the same bytes."""

    @property
    def peak_bytes(self) -> int:
        """Largest number of bytes alive at once on a device, everything counted."""
        return max(device.peak_bytes for device in self.devices)

    @property
    def padding_bytes(self) -> int:
        """Bytes by which the shards of all devices together exceed the parameters; 0 unless the model is sharded."""
        if self.strategy != "fsdp2":
            return 0
        return self.num_devices * self.devices[0].parameter_bytes - self.model_bytes

    def report(self) -> str:
        """Return the figures as a table."""
        lines = device_lines(self.devices[0]) if len(self.devices) == 1 else stage_lines(self.devices)
        if self.communication:
            lines += ["", *communication_lines(self.communication)]
        if self.padding_bytes:
            lines += ["", *padding_lines(self.num_devices, self.model_bytes, self.padding_bytes)]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.report()
