"""Parameters, FLOPs, peak activation memory and step time of the models, on a batch of CIFAR's size.

    python benchmarks/models.py [--batch-size 100] [--num-steps 5]

Each model as `revnet train` runs it (channels-last weights), each reversible one beside its stored twin. Bytes are
counted exactly; times are medians of raw training steps (forward, cross-entropy, backward), interleaved in one process.
Writes a table and its CSV into benchmarks/results/.
"""

import argparse
import csv
import datetime
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revnet import Reverse, Store, create_model, list_models
from revnet.bench import describe_machine, hardware_name
from revnet.memory import count_flops, measure

RESULTS = Path(__file__).parent / "results"


def make_variants() -> dict[str, nn.Module]:
    """Every model, and the stored twins of the reversible ones."""
    variants = {}
    for name in list_models():
        model = create_model(name)
        policies = {"": Reverse(), ", stored twin": Store()} if model.is_reversible else {"": None}
        for suffix, policy in policies.items():
            options = {} if policy is None else {"policy": policy}
            variants[name + suffix] = create_model(name, **options).to(memory_format=torch.channels_last)
    return variants


def step_seconds(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Time one forward and backward pass."""
    start = time.perf_counter()
    F.cross_entropy(model(images), labels).backward()
    return time.perf_counter() - start


def main() -> None:
    """Measure, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--num-steps", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    images, labels = torch.randn(arguments.batch_size, 3, 32, 32), torch.randint(10, (arguments.batch_size,))
    variants = make_variants()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(arguments.num_steps + 1):
        for name, model in variants.items():
            times[name].append(step_seconds(model, images, labels))
    rows = [
        {
            "model": name,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "mflops": round(count_flops(model, images[:1]) / 1e6, 1),
            "peak_bytes": measure(model, images).peak_bytes,
            "step_seconds": round(statistics.median(times[name][1:]), 4),  # the first step warms up
        }
        for name, model in variants.items()
    ]
    command = f"python benchmarks/models.py --batch-size {arguments.batch_size} --num-steps {arguments.num_steps}"
    lines = [
        "# Models on a batch of CIFAR's size",
        "",
        *describe_machine(command),
        f"- Batch: {arguments.batch_size} images of 3x32x32, float32. Bytes are above parameters, gradients, buffers",
        "  and the input, counted exactly. Times are medians, interleaved in one process; read them as ratios.",
        "",
        "| model | parameters | MFLOPs, forward, one image | peak MiB | step s | step / resnet32 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    reference = next(row["step_seconds"] for row in rows if row["model"] == "resnet32")
    lines += [
        f"| {row['model']} | {row['parameters']:,} | {row['mflops']} | {row['peak_bytes'] / 2**20:.1f} "
        f"| {row['step_seconds']:.3f} | {row['step_seconds'] / reference:.2f} |"
        for row in rows
    ]
    name = f"models_{hardware_name()}_{datetime.date.today()}"
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(*lines, sep="\n")


if __name__ == "__main__":
    main()
