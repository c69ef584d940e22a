"""i-RevNet: images and their reconstruction from the last map, and memory and error by depth.

    revnet train --model irevnet_cifar --data cifar10 --epochs 2 --out-dir runs/irevnet
    python benchmarks/irevnet.py runs/irevnet --data cifar10

Each test image goes through the trained network to its last map and back. The error is given in gray levels, of which
an image has 256. The memory of a training step does not depend on the depth; the bytes are counted. Writes a page, its
CSV and a figure to benchmarks/results/.
"""

import argparse
import csv
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from _memory_page import Row, mib, table, write_csv
from torch import Tensor

from revnet import AbstractPolicy, Reverse, Store
from revnet._figure import check_matplotlib, new_figure, save
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.data import load_dataset
from revnet.memory import predict
from revnet.models import IRevNet
from revnet.training import Classifier, load_classifier

RESULTS = Path(__file__).parent / "results"
DEPTHS = (2, 6, 18, 54)


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
        "changed_pixels": int((difference.abs() >= 0.5).sum()),
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


def accuracy(classifier: Classifier, images: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """Return the share of correctly classified images."""
    with torch.inference_mode():
        predictions = torch.cat([classifier(batch).argmax(1) for batch in images.split(batch_size)])
    return (predictions == labels).double().mean().item()


def learning(run: Path) -> list[str]:
    """Return the run's log as a table, and its test accuracy."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if name == "epoch" or name.endswith(("_loss", "_accuracy"))]
    lines = table(
        [name.replace("_", " ") for name in columns], [[_short(row[name]) for name in columns] for row in rows]
    )
    summary = json.loads((run / "summary.json").read_text())
    return [
        *lines,
        f"Accuracy on the {summary['test_images']:,} test images: {100 * summary['test_accuracy']:.2f} %.",
        "",
    ]


def _short(figure: str) -> str:
    return figure if figure.isdigit() else f"{float(figure):.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run of `revnet train` with an i-RevNet")
    parser.add_argument("--data", default="cifar10", help="data set of the test images")
    parser.add_argument("--num-images", type=int, default=10_000, help="number of images in the round trip")
    parser.add_argument("--num-shown", type=int, default=10, help="number of images in the figure")
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)), help="blocks per stage, for the second table")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    check_matplotlib()
    classifier = load_classifier(given.run)
    if not isinstance(classifier.model, IRevNet):
        parser.error(f"`{given.run}` holds a {type(classifier.model).__name__}, but must hold an i-RevNet")
    test = load_dataset(given.data).test
    images, labels = test.images[: given.num_images], test.labels[: given.num_images]
    untrained = Classifier.create(classifier.header, classifier.preprocess).eval()
    before, after = (100 * accuracy(model, images, labels) for model in (untrained, classifier))
    back = reconstruction(classifier, images)
    depths = [by_depth(int(depth)) for depth in given.depths.split(",")]
    stem = f"irevnet_{hardware_name()}_{datetime.date.today()}"
    given.out_dir.mkdir(parents=True, exist_ok=True)
    shown = images[: given.num_shown]
    draw(shown, round_trip(classifier, shown), given.out_dir / f"{stem}.png")
    write_csv(depths, given.out_dir / f"{stem}.csv")
    columns = ("blocks", "parameters", "reverse MiB", "store MiB", "round-trip error")
    cells = [
        [
            str(row["num_blocks"]),
            f"{row['parameters']:,}",
            mib(row["reverse_bytes"]),
            mib(row["store_bytes"]),
            f"{row['largest_error']:.1e}",
        ]
        for row in depths
    ]
    page = [
        "# i-RevNet: reconstruction of images from the last map",
        "",
        *describe_machine(shlex.join(["python", "benchmarks/irevnet.py", *arguments])),
        "",
        "## Training",
        "",
        *learning(given.run),
        f"Accuracy on the {len(images):,} images below: {before:.2f} % before training, {after:.2f} % after.",
        "",
        "## Round trip",
        "",
        f"{back['images']:,} test images went to the last map of the trained network and back, in float32. The largest",
        f"error of a value is {back['largest_error']:.1e} of 256 gray levels, and the mean error "
        f"{back['mean_error']:.1e};",
        f"{back['changed_pixels']} of {images.numel():,} values differ after rounding to gray levels.",
        "",
        "Top: images; middle: reconstructions; bottom: magnified differences.",
        "",
        f"![{stem}.png]({stem}.png)",
        "",
        "## By depth",
        "",
        "The same network with other numbers of blocks, 100 images of 32x32. Memory: the counted peak of",
        "activations in a training step, without parameters and gradients, by the policy of the blocks. Error: the",
        "largest round-trip error of standard normal images in float32, before training.",
        "",
        *table(columns, cells),
    ]
    text = "\n".join(page).rstrip() + "\n"
    (given.out_dir / f"{stem}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
