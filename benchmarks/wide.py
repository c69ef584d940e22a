"""A wide RevNet of the class of ResNet-18: a run on CIFAR-10, and the memory of its update by policy.

    revnet train --config cifar10/cpu/revnet38 --model benchmarks._wide_net:wide_revnet --out-dir runs/wide
    python benchmarks/wide.py runs/wide

Memory is predicted from shapes, for the images and the batch of the run, in float32 and under autocast. Writes a page,
a CSV for each table and the learning curve to benchmarks/results/.
"""

import argparse
import datetime
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from _memory_page import Row, Section, mib, table, write_sections
from _training_page import check_run, describe_runs, training_section
from _wide_net import wide_revnet

from revnet import AbstractPolicy, Checkpoint, Reverse, Store
from revnet._hardware import hardware_name
from revnet.memory import count_flops, predict

RESULTS = Path(__file__).parent / "results"
PUBLISHED = {"ResNet-18": 6.98, "ResNet-18, pre-activation": 4.89}
PUBLISHED_EPOCHS = 350
POLICIES: dict[str, AbstractPolicy] = {"reversed": Reverse(), "checkpointed": Checkpoint(), "stored": Store()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, read the run, and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of `revnet train` with this network")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    parser.add_argument("--note", help="what a reader should know about the run, for the head of the page")
    given = parser.parse_args(arguments)
    check_run(parser, given.run)
    summary = json.loads((given.run / "summary.json").read_text())
    training = training_section(given.run)
    training.lines.extend(next_to_published(training.rows[-1]["epoch"], summary["test_accuracy"]))
    sections = {"training": training, "memory": memory_section(summary["batch_size"])}
    with torch.device("meta"):
        model = wide_revnet(10, 3)
        flops = count_flops(model, torch.empty(1, 3, 32, 32))
    network = (
        f"- Network: {sum(parameter.numel() for parameter in model.parameters()):,} parameters, "
        f"{flops / 1e6:,.0f} MFLOPs for a forward pass of one image; `benchmarks/_wide_net.py`"
    )
    stem = f"wide-cifar10_{hardware_name()}_{datetime.date.today()}"
    page = [
        "# A wide RevNet on CIFAR-10",
        "",
        *describe_runs(["python", "benchmarks/wide.py", *arguments], [given.run], network, note=given.note),
        "",
    ]
    given.out_dir.mkdir(parents=True, exist_ok=True)
    if (curve := given.run / "learning_curve.png").is_file():
        shutil.copy(curve, given.out_dir / f"{stem}.png")
        training.lines.extend([f"![Loss and accuracy by epoch]({stem}.png)", ""])
    write_sections(page, sections, given.out_dir / stem)


def next_to_published(epochs: str, accuracy: float) -> list[str]:
    """Return a table of the run and of published figures, with what differs."""
    rows = [
        ["wide RevNet, one seed", epochs, f"{100 * (1 - accuracy):.2f} %"],
        *[[name, str(PUBLISHED_EPOCHS), f"{value:.2f} %"] for name, value in PUBLISHED.items()],
    ]
    return [
        *table(("network", "epochs", "test error"), rows),
        "The figures of the ResNets are from [pytorch-cifar](https://github.com/kuangliu/pytorch-cifar), for the",
        "original images, with a rate that falls by a factor of 10 after 150 and after 250 epochs. The run above is",
        "much shorter, on a copy of the images that was compressed as JPEG, by the recipe of",
        "`configs/cifar10/cpu/revnet38.yaml`: averaged weights, and images that grow to 32x32 pixels.",
        "",
    ]


def memory_section(batch_size: int) -> Section:
    """Predict the bytes of an update by policy."""
    rows: list[Row] = []
    for name, policy in POLICIES.items():
        with torch.device("meta"):
            model, images = wide_revnet(10, 3, policy), torch.empty(batch_size, 3, 32, 32)
        row: Row = {"policy": name}
        for precision, dtype in (("float32", None), ("bf16", torch.bfloat16)):
            row[f"{precision}_bytes"] = predict(model, images, autocast=dtype).activation_bytes
        rows.append(row)
    lines = [
        f"## Memory of an update of {batch_size} images",
        "",
        "The peak of the activations, without parameters and gradients, in float32 and under autocast.",
        "",
        *table(
            ("blocks", "float32, MiB", "bf16-mixed, MiB"),
            [[row["policy"], mib(row["float32_bytes"]), mib(row["bf16_bytes"])] for row in rows],
        ),
    ]
    return Section(lines, rows)


if __name__ == "__main__":
    main()
