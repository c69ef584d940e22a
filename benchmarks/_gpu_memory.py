"""A part of `gpu.py`: allocated memory against the prediction."""

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from _gpu_nets import OPTIMIZER, inputs_of, loss_of, make, training_step
from _gpu_part import Part, Setting
from _gpu_step import attempt, low_precision, release, watch
from _memory_page import Row, mib, table

from revnet import AbstractPolicy, Checkpoint, Reverse, Store
from revnet.memory import measure, predict

POLICIES: Sequence[AbstractPolicy] = (Reverse(), Checkpoint(), Store())


class Config(NamedTuple):
    """A step whose memory is predicted and measured."""

    name: str
    size: int
    """Number of images or tokens."""
    has_autocast: bool = False


CONFIGS = (
    Config("revnet110", 100),
    Config("revnet104", 16),
    Config("revnet104", 16, has_autocast=True),
    Config("transformer", 4096, has_autocast=True),
)
QUICK_CONFIGS = (Config("tiny revnet", 2), Config("tiny transformer", 16, has_autocast=True))


def rows(setting: Setting) -> Iterator[Row]:
    """Predict and measure each step with each policy."""
    for config in QUICK_CONFIGS if setting.quick else CONFIGS:
        for policy in POLICIES:
            yield _row(config, policy, setting)
            release(setting.device)


def _row(config: Config, policy: AbstractPolicy, setting: Setting) -> Row:
    device = setting.device
    autocast = low_precision(device) if config.has_autocast else None
    with torch.device("meta"):
        fake, x = make(config.name, policy), inputs_of(config.name, config.size)
    start = time.perf_counter()
    options = {"optimizer": OPTIMIZER, "loss": loss_of, "autocast": autocast}
    predicted = predict(fake, x, device=device, **options)
    row = {
        "network": config.name,
        "size": config.size,
        "autocast": str(autocast).removeprefix("torch.") if autocast else "",
        "policy": str(policy),
        "predicted_bytes": predicted.peak_bytes,
        "predict_seconds": time.perf_counter() - start,
    }
    if device.type != "cuda":  # a CPU has no memory statistics; count the bytes
        counted = measure(make(config.name, policy), inputs_of(config.name, config.size), **options)
        return row | {"allocated_bytes": counted.peak_bytes, "other_bytes": 0, "reserved_bytes": None, "note": ""}
    constant_bytes = predicted.parameter_bytes + predicted.buffer_bytes + predicted.input_bytes
    return row | _measured(config, policy, device, autocast, constant_bytes + predicted.optimizer_bytes)


def _measured(
    config: Config, policy: AbstractPolicy, device: torch.device, autocast: torch.dtype | None, constant_bytes: int
) -> Row:
    """Measure a training step with the statistics of the CUDA allocator."""
    result: Row = {"allocated_bytes": None, "other_bytes": None, "reserved_bytes": None}

    def run() -> None:
        model, x = make(config.name, policy).to(device), inputs_of(config.name, config.size).to(device)
        optimizer = OPTIMIZER(model.parameters())
        for _ in range(2):  # allocates the optimizer's state and the workspaces of libraries
            training_step(model, x, optimizer, autocast)
        peak = watch(lambda: training_step(model, x, optimizer, autocast), device)
        result["other_bytes"] = peak.before_bytes - constant_bytes
        result.update(allocated_bytes=peak.allocated_bytes, reserved_bytes=peak.reserved_bytes)

    return result | {"note": attempt(run, device)}


def lines(rows_of_part: Sequence[Row]) -> list[str]:
    """Return the lines of the table."""
    columns = ("network", "policy", "predicted, MiB", "allocated, MiB", "other, MiB", "allocated - other, / predicted")
    return [
        "A training step with SGD and momentum. Bytes include parameters, gradients, the optimizer's state and",
        "activations. *Predicted* is from `revnet.memory.predict(..., device=...)` on the meta device. *Allocated* and",
        "*reserved* are PyTorch's peaks over one step, after two to warm up. *Other* was allocated before the step and",
        "is not one of its tensors: workspaces of cuBLAS, which are not predicted. On a CPU, *allocated* is counted by",
        "`revnet.memory.measure`.",
        "",
        *table(
            (*columns, "reserved, MiB", "reserved / predicted", "predicting, s"), [_cells(row) for row in rows_of_part]
        ),
    ]


def _cells(row: Row) -> list[str]:
    name = ", ".join(filter(None, [row["network"], f"{row['size']:,}", row["autocast"]]))
    return [
        name,
        f"`{row['policy']}`",
        mib(row["predicted_bytes"]),
        row["note"] or mib(row["allocated_bytes"]),
        mib(row["other_bytes"]),
        "" if row["note"] else _ratio(row["allocated_bytes"] - row["other_bytes"], row["predicted_bytes"]),
        mib(row["reserved_bytes"]),
        _ratio(row["reserved_bytes"], row["predicted_bytes"]),
        f"{row['predict_seconds']:.1f}",
    ]


def _ratio(measured: int | None, predicted: int) -> str:
    return "" if measured is None else f"{measured / predicted:.3f}"


MEMORY = Part("memory", "Allocated and reserved bytes against the prediction", 90, rows, lines)
