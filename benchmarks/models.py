"""Parameters, FLOPs, peak activation memory and step time of the models, at their published image size.

    python benchmarks/models.py
    python benchmarks/models.py --models resnet101,revnet104 --batch-size 32 --largest-batch --device cuda

The models have channels-last weights, as in `revnet train`, and each reversible model is compared with its stored twin.
Bytes are exact, from shapes alone. Times are medians of training steps (forward, cross-entropy, backward), interleaved
in one process. The largest batch is the largest one whose step fits on the GPU. Writes a table and its CSV to
benchmarks/results/.
"""

import argparse
import csv
import datetime
import gc
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet import Store, create_model, list_models
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.memory import count_flops, measure
from revnet.models import published_image_size

RESULTS = Path(__file__).parent / "results"
TWIN = ", stored twin"


def make(variant: str) -> nn.Module:
    """Return a model by name, or its stored twin."""
    options = {"policy": Store()} if variant.endswith(TWIN) else {}
    return create_model(variant.removesuffix(TWIN), **options).to(memory_format=torch.channels_last)


def variants_of(names: list[str]) -> list[str]:
    """Return all models, and the stored twins of the reversible ones."""
    with torch.device("meta"):
        return [name + suffix for name in names for suffix in (["", TWIN] if make(name).is_reversible else [""])]


def counted(variant: str, batch_size: int, size: int) -> dict[str, int | float]:
    """Return parameters, FLOPs and bytes, from shapes alone."""
    with torch.device("meta"):
        model = make(variant)
        return {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "mflops": round(count_flops(model, torch.empty(1, 3, size, size)) / 1e6, 1),
            "peak_bytes": measure(model, torch.empty(batch_size, 3, size, size)).activation_bytes,
        }


def step(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> None:
    """Run one forward and backward pass."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16-mixed"):
        loss = F.cross_entropy(model(images), labels)
    loss.backward()


def step_seconds(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> float:
    """Return the time of one step."""
    model.zero_grad(set_to_none=False)
    synchronize(images.device)
    start = time.perf_counter()
    step(model, images, labels, precision)
    synchronize(images.device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, if there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated_bytes(model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> int:
    """Return the peak of a step minus the memory before it, from the allocator of a GPU."""
    step(model, images, labels, precision)  # allocates gradients and workspaces
    gc.collect()
    torch.cuda.reset_peak_memory_stats(images.device)
    before = torch.cuda.memory_allocated(images.device)
    step(model, images, labels, precision)
    return torch.cuda.max_memory_allocated(images.device) - before


def largest_batch(variant: str, size: int, device: torch.device, precision: str) -> int:
    """Return the largest batch whose step fits, with an accuracy of 1/16."""
    model = make(variant).to(device)

    def fits(batch_size: int) -> bool:
        try:
            images = torch.randn(batch_size, 3, size, size, device=device)
            step(model, images, torch.zeros(batch_size, dtype=torch.int64, device=device), precision)
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
        return True

    low = 1
    while fits(2 * low):
        low *= 2
    high = 2 * low
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", default=",".join(name for name in list_models() if published_image_size(name) == 32)
    )
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--image-size", type=int, help="default: published size of the first model")
    parser.add_argument("--num-steps", type=int, default=5)
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed"], default="32-true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--largest-batch", action="store_true", help="on a GPU: search for the largest batch that fits")
    arguments = parser.parse_args()
    device, names = torch.device(arguments.device), arguments.models.split(",")
    if arguments.largest_batch and device.type != "cuda":
        parser.error("--largest-batch needs --device cuda")
    size, precision = arguments.image_size or published_image_size(names[0]), arguments.precision
    torch.manual_seed(0)
    images = torch.randn(arguments.batch_size, 3, size, size, device=device)
    labels = torch.randint(10, (arguments.batch_size,), device=device)

    models = {variant: make(variant).to(device) for variant in variants_of(names)}
    times: dict[str, list[float]] = {variant: [] for variant in models}
    for _ in range(arguments.num_steps + 1):
        for variant, model in models.items():
            times[variant].append(step_seconds(model, images, labels, precision))
    rows = []
    for variant, model in models.items():
        row: dict[str, str | int | float] = {"model": variant, **counted(variant, arguments.batch_size, size)}
        row["step_seconds"] = round(statistics.median(times[variant][1:]), 4)  # the first step warms up
        row["images_per_second"] = round(arguments.batch_size / row["step_seconds"], 1)
        if device.type == "cuda":
            row["allocated_bytes"] = allocated_bytes(model, images, labels, precision)
        rows.append(row)
    del models, model
    if arguments.largest_batch:
        for row in rows:
            row["largest_batch"] = largest_batch(str(row["model"]), size, device, precision)
    write(rows, arguments, size, device)


def write(rows: list[dict], arguments: argparse.Namespace, size: int, device: torch.device) -> None:
    """Write the page and its CSV, and print the page."""
    given = {"models": arguments.models, "batch-size": arguments.batch_size, "image-size": size}
    given |= {"num-steps": arguments.num_steps, "precision": arguments.precision, "device": arguments.device}
    options = " ".join(f"--{name} {value}" for name, value in given.items())
    command = f"python benchmarks/models.py {options}" + " --largest-batch" * arguments.largest_batch
    columns = {"model": "model", "parameters": "parameters", "mflops": "MFLOPs, forward, one image"}
    columns |= {"peak_bytes": "peak MiB", "allocated_bytes": "allocated MiB", "step_seconds": "step s"}
    columns |= {"images_per_second": "images/s", "largest_batch": "largest batch"}
    columns = {name: title for name, title in columns.items() if name in rows[0]}
    lines = [
        f"# Models on images of {size}x{size}",
        "",
        *describe_machine(command, device=device),
        f"- Batch: {arguments.batch_size} images of 3x{size}x{size}, {arguments.precision}. Peak bytes exclude",
        "  parameters, gradients, buffers and the input, and are from shapes in float32. Times are medians,",
        "  interleaved in one process; read them as ratios.",
        "",
        f"| {' | '.join(columns.values())} | step / {rows[0]['model']} |",
        f"| --- |{' ---: |' * len(columns)}",
    ]
    for row in rows:
        cells = [
            f"{row[name] / 2**20:.1f}"
            if name.endswith("_bytes")
            else f"{row[name]:,}"
            if name != "model"
            else row[name]
            for name in columns
        ]
        lines.append(f"| {' | '.join(cells)} | {row['step_seconds'] / rows[0]['step_seconds']:.2f} |")
    name = f"models-{size}_{hardware_name(device)}_{datetime.date.today()}"
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
