"""i-RevNet: images and their reconstruction from the last map, and memory and error by depth.

    revnet train --model irevnet_cifar --data cifar10 --epochs 2 --seed 0 --out-dir runs/irevnet-0
    revnet train --model irevnet_cifar --data cifar10 --epochs 2 --seed 1 --out-dir runs/irevnet-1
    python benchmarks/irevnet.py runs/irevnet-0 runs/irevnet-1 --data cifar10

The runs differ in their seeds. Each test image goes through the trained network to its last map and back. The error is
given in gray levels, of which an image has 256. The memory of a training step does not depend on the depth; the bytes
are counted. Writes a page, a CSV for each table and a figure, by the first run, to benchmarks/results/.
"""

import argparse
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from _memory_page import Row, Section, mib, table, write_sections
from _training_page import check_run, describe_runs, epochs_by_seed, errors_by_seed, read_run
from torch import Tensor

from revnet import AbstractPolicy, Reverse, Store
from revnet._figure import check_matplotlib, new_figure, save
from revnet._hardware import hardware_name
from revnet.data import load_dataset
from revnet.memory import predict
from revnet.models import IRevNet
from revnet.training import Classifier, load_classifier

RESULTS = Path(__file__).parent / "results"
DEPTHS = (2, 6, 18, 54)
PUBLISHED_NAME, PUBLISHED_EPOCHS, PUBLISHED_ERROR = "published i-RevNet", 200, 5.5


def round_trip(classifier: Classifier, images: Tensor, batch_size: int = 500) -> Tensor:
    """Return images, in gray levels, computed from the last map of the network."""
    model, preprocess = classifier.model, classifier.preprocess
    assert isinstance(model, IRevNet)
    with torch.inference_mode():
        inputs = [model.inverse(model.forward_invertible(preprocess(batch))) for batch in images.split(batch_size)]
    return torch.cat(inputs) * preprocess.scale + preprocess.mean


def reconstruction(classifier: Classifier, images: Tensor) -> Row:
    """Return the errors of the reconstructed images."""
    difference = round_trip(classifier, images) - images
    return {
        "images": len(images),
        "largest_error": difference.abs().max().item(),
        "mean_error": difference.abs().mean().item(),
        "changed_values": int((difference.abs() >= 0.5).sum()),
        "values": images.numel(),
    }


def by_depth(num_blocks: int, batch_size: int = 100) -> Row:
    """Return parameters, memory of a training step and the round-trip error, without training."""

    def make(policy: AbstractPolicy) -> IRevNet:
        return IRevNet(num_blocks=(num_blocks,) * 3, strides=(1, 2, 2), hidden_widths=(32, 64, 128), policy=policy)

    torch.manual_seed(0)
    model = make(Reverse())
    x = torch.randn(batch_size, 3, 32, 32)
    with torch.device("meta"):
        step = torch.empty(batch_size, 3, 32, 32)
        reversed_, stored = (predict(make(policy), step).activation_bytes for policy in (Reverse(), Store()))
    with torch.inference_mode():
        model(x)  # updates the statistics of batch norm
        model.eval()
        error = (model.inverse(model.forward_invertible(x)) - x).abs().max().item()
    return {
        "num_blocks": 3 * num_blocks,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "reverse_bytes": reversed_,
        "store_bytes": stored,
        "largest_error": error,
    }


def draw(images: Tensor, returned: Tensor, path: Path) -> None:
    """Draw images, their reconstructions, and the magnified differences."""
    gain = 1e5
    rows = {
        "image": images / 255,
        "from the last map": returned / 255,
        f"difference\nx {gain:,.0f}": 0.5 + gain * (returned - images) / 255,
    }
    figure = new_figure(1.05 * len(images) + 0.4, 3.5, layout="constrained")
    axes = figure.subplots(len(rows), len(images))
    for line, (name, row_images) in zip(axes, rows.items(), strict=True):
        for cell, image in zip(line, row_images, strict=True):
            cell.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            cell.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize="small")
    save(figure, path)


def training_section(runs: Sequence[Path]) -> Section:
    """Return the results of the runs, next to the published figure."""
    summaries = [read_run(run) for run in runs]
    (data,) = {summary["data"] for summary in summaries}
    epochs = epochs_by_seed(runs)
    lines = [
        f"## Training {summaries[0]['model']} on {data}",
        "",
        f"{summaries[0]['num_updates']:,} updates of {summaries[0]['batch_size']} images with each seed.",
        "",
        *errors_by_seed(summaries, {PUBLISHED_NAME: (PUBLISHED_EPOCHS, PUBLISHED_ERROR)}),
        "The published figure, an accuracy of about 94.5 %, is from the authors'",
        "[code](https://github.com/jhjacobsen/pytorch-i-revnet). Their network is three times as deep and pads images",
        "with channels of zeros, so it is not bijective. It is trained on the original images for much longer, with",
        "dropout. For ImageNet, on which the paper compares i-RevNets with other networks, they give top-1 errors of",
        "24.7 % for a ResNet, 25.2 % for a RevNet, 24.7 % for an i-RevNet, and 26.0 % for a bijective i-RevNet. No",
        "network for ImageNet was trained here.",
        "",
        *table(
            tuple(name.replace("_", " ") for name in epochs[0]), [[_short(v) for v in row.values()] for row in epochs]
        ),
    ]
    return Section(lines, epochs)


def round_trip_section(rows: list[Row], picture: str) -> Section:
    """Return the errors of the reconstructions, and the figure."""
    lines = [
        "## Round trip",
        "",
        "Test images went to the last map of the trained network and back, in float32. Errors are in gray levels, of",
        "which there are 256. A value is changed if it differs after rounding to gray levels.",
        "",
        *table(
            ("seed", "images", "largest error", "mean error", "changed values", "values"),
            [
                [
                    str(row["seed"]),
                    f"{row['images']:,}",
                    f"{row['largest_error']:.1e}",
                    f"{row['mean_error']:.1e}",
                    f"{row['changed_values']:,}",
                    f"{row['values']:,}",
                ]
                for row in rows
            ],
        ),
        f"Top: images; middle: reconstructions with seed {rows[0]['seed']}; bottom: magnified differences.",
        "",
        f"![{picture}]({picture})",
        "",
    ]
    return Section(lines, rows)


def depth_section(rows: list[Row]) -> Section:
    """Return memory and errors by depth."""
    lines = [
        "## By depth",
        "",
        "The same network with other numbers of blocks, 100 images of 32x32. Memory: the counted peak of",
        "activations in a training step, without parameters and gradients, by the policy of the blocks. Error: the",
        "largest round-trip error of standard normal images in float32, before training.",
        "",
        *table(
            ("blocks", "parameters", "reverse MiB", "store MiB", "round-trip error"),
            [
                [
                    str(row["num_blocks"]),
                    f"{row['parameters']:,}",
                    mib(row["reverse_bytes"]),
                    mib(row["store_bytes"]),
                    f"{row['largest_error']:.1e}",
                ]
                for row in rows
            ],
        ),
    ]
    return Section(lines, rows)


def _short(figure: str) -> str:
    return figure if figure.isdigit() else f"{float(figure):.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs of `revnet train` with an i-RevNet")
    parser.add_argument("--data", default="cifar10", help="data set of the test images")
    parser.add_argument("--num-images", type=int, default=10_000, help="number of images in the round trip")
    parser.add_argument("--num-shown", type=int, default=10, help="number of images in the figure")
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)), help="blocks per stage, for the last table")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    parser.add_argument("--note", help="what a reader should know about the runs, for the head of the page")
    given = parser.parse_args(arguments)
    check_matplotlib()
    classifiers = [_load(parser, run) for run in given.runs]
    images = load_dataset(given.data).test.images[: given.num_images]
    stem = f"irevnet_{hardware_name()}_{datetime.date.today()}"
    given.out_dir.mkdir(parents=True, exist_ok=True)
    shown = images[: given.num_shown]
    draw(shown, round_trip(classifiers[0], shown), given.out_dir / f"{stem}.png")
    trips = [
        {"seed": read_run(run)["seed"], **reconstruction(classifier, images)}
        for run, classifier in zip(given.runs, classifiers, strict=True)
    ]
    sections = {
        "training": training_section(given.runs),
        "round_trip": round_trip_section(trips, f"{stem}.png"),
        "depth": depth_section([by_depth(int(depth)) for depth in given.depths.split(",")]),
    }
    heading = [
        "# i-RevNet: reconstruction of images from the last map",
        "",
        *describe_runs(["python", "benchmarks/irevnet.py", *arguments], given.runs, note=given.note),
        "",
    ]
    write_sections(heading, sections, given.out_dir / stem)


def _load(parser: argparse.ArgumentParser, run: Path) -> Classifier:
    check_run(parser, run)
    classifier = load_classifier(run)
    if not isinstance(classifier.model, IRevNet):
        parser.error(f"`{run}` holds a {type(classifier.model).__name__}, but must hold an i-RevNet")
    return classifier


if __name__ == "__main__":
    main()
