"""Format the memory of several devices as lines of text."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import groupby

from revnet._bytes import format_bytes
from revnet._text_table import aligned
from revnet.memory.distributed._device_memory import Communication, DeviceMemory
from revnet.memory.step._step_report import WHEN, breakdown_rows


def device_lines(device: DeviceMemory) -> list[str]:
    """Return a table of the peak of one device, and of the bytes that it holds between the passes."""
    rows = breakdown_rows(asdict(device.at_peak))
    rows.append(("gradients after the backward pass", format_bytes(device.gradient_bytes), ""))
    rows.append(("activations held between the passes", format_bytes(device.held_bytes), ""))
    if device.communication_bytes:
        rows.append(("gathered parameters and buckets held", format_bytes(device.communication_bytes), ""))
    peak = f"peak {format_bytes(device.peak_bytes)} on {device.name}, {WHEN[device.peak_phase]}"
    return [peak, "", *aligned(rows, num_left=1)]


def stage_lines(stages: Sequence[DeviceMemory]) -> list[str]:
    """Return a table of stages, in which a run of equal stages has one row."""
    table: list[tuple[str, ...]] = [("stages", "parameters", "gradients", "optimizer state", "held", "peak")]
    numbered = enumerate(stages)
    for _, group in groupby(numbered, key=lambda item: replace(item[1], name="")):
        run = list(group)
        (first, stage), (last, _) = run[0], run[-1]
        sizes = (
            stage.parameter_bytes,
            stage.gradient_bytes,
            stage.optimizer_bytes,
            stage.held_bytes + stage.communication_bytes,
            stage.peak_bytes,
        )
        name = f"{first}" if first == last else f"{first} to {last}"
        table.append((name, *map(format_bytes, sizes)))
    peak = max(stages, key=lambda stage: stage.peak_bytes)
    line = f"peak {format_bytes(peak.peak_bytes)} on stage {stages.index(peak)}, {WHEN[peak.peak_phase]}"
    note = "Held: activations and received streams between the passes of two microbatches."
    return [line, "", *aligned(table, num_left=1), "", note]


def communication_lines(communication: Iterable[Communication]) -> list[str]:
    """Return a table of the communication of a step."""
    rows = [("in each step", "", "calls", "bytes")]
    rows += [(entry.phase, entry.kind, f"{entry.count:,}", format_bytes(entry.num_bytes)) for entry in communication]
    return aligned(rows, num_left=2)


def padding_lines(num_devices: int, model_bytes: int, padding_bytes: int) -> list[str]:
    """Return a note about the padding of the shards."""
    whole, padding = format_bytes(model_bytes + padding_bytes), format_bytes(padding_bytes)
    return [
        f"Padding: FSDP2 cuts the first dimension of each parameter into {num_devices:,} equal shards.",
        f"Together they take {whole}, of which {padding} are padding. Collectives move it, too.",
    ]
