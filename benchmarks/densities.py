"""NICE, RealNVP and Glow: bits per dimension, round trips, log-determinants, and memory by depth.

    revnet train nice --seed 0 --out-dir runs/nice-0
    revnet train nice --seed 1 --out-dir runs/nice-1
    revnet train nice --model glow --out-dir runs/glow
    python benchmarks/densities.py runs/nice-0 runs/nice-1 runs/glow

The first two tables compare the given runs, average those that differ only in their seeds, and list published figures.
The other tables need no training: the log-determinant of small networks in float64 next to the one that autograd's
Jacobian gives, and the counted bytes of a training step. Writes a page and its CSV to benchmarks/results/.
"""

import argparse
import datetime
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from _memory_page import Row, mib, table, write_csv
from _training_page import check_run, describe_runs, read_run
from torch import Tensor, nn

from revnet._hardware import hardware_name
from revnet.memory import predict
from revnet.models import NICE, Glow, RealNVP
from revnet.nn import FlowStep, initialize_act_norms
from revnet.training import load_density
from revnet.training.density.images import load_images

RESULTS = Path(__file__).parent / "results"
DEPTHS = (4, 8, 16)
SHAPE = (1, 8, 8)
NUM_JACOBIANS = 8
MODELS: dict[str, Callable[..., Any]] = {
    "nice": lambda depth, **options: NICE(num_couplings=depth, num_hidden=2, hidden_dim=256, **options),
    "realnvp": lambda depth, **options: RealNVP(num_couplings=depth, num_blocks=2, hidden_dim=32, **options),
    "glow": lambda depth, **options: Glow(num_steps=depth, num_scales=2, hidden_dim=64, **options),
}
"""The networks of the recipes for digits, by their number of couplings at each scale."""
PUBLISHED = {("cifar10", "nice"): 4.48, ("cifar10", "realnvp"): 3.49, ("cifar10", "glow"): 3.35}
"""Published bits per dimension of test images."""


def result_of(run: Path, num_images: int) -> Row:
    """Return the final figures of a run, and the errors of test images that went to their codes and back."""
    summary = read_run(run)
    density = load_density(run)
    header = density.header
    images = load_images(header.data, image_size=header.image_shape[1] if header.is_resized else None).test.images
    chosen = images[:num_images]
    x = density.dequantize(chosen, torch.Generator().manual_seed(0))
    with torch.no_grad():
        returned = torch.cat([density.model.inverse(density.model(batch)[0]) for batch in x.split(100)])
    return {
        "data": summary["data"],
        "model": summary["model"],
        "seed": summary["seed"],
        "parameters": sum(parameter.numel() for parameter in density.model.parameters()),
        "updates": summary["num_updates"],
        "test_bits_per_dim": summary["test_bits_per_dim"],
        "best_test_bits_per_dim": summary["best_test_bits_per_dim"],
        "train_seconds": summary["train_seconds"],
        "reverse_bytes": summary["peak_bytes"],
        "store_bytes": summary["stored_peak_bytes"],
        "images": len(chosen),
        "largest_error": (returned - x).abs().max().item(),
        "changed_pixels": int((density.dequantize.inverse(returned) != chosen).sum()),
    }


def log_det_error(name: str) -> Row:
    """Return the difference between the log-determinant of a small network and the one of autograd's Jacobian."""
    torch.manual_seed(0)
    model = MODELS[name](2, image_shape=SHAPE).double()
    for module in model.modules():
        # The last layer of each coupling is initialized to zero.
        if isinstance(module, FlowStep | nn.Sequential):
            for parameter in (module.f if isinstance(module, FlowStep) else module).parameters():
                nn.init.normal_(parameter, std=0.05)
    x = torch.rand(NUM_JACOBIANS, *SHAPE, dtype=torch.float64)
    if name != "nice":
        initialize_act_norms(model, x)
    _, log_det = model(x)
    jacobians = [_jacobian(model, image) for image in x]
    errors = [log_det[index] - jacobian.slogdet().logabsdet for index, jacobian in enumerate(jacobians)]
    return {
        "model": name,
        "log_det": log_det.mean().item(),
        "largest_error": torch.stack(errors).abs().max().item(),
        "condition": max(torch.linalg.cond(jacobian).item() for jacobian in jacobians),
    }


def _jacobian(model: nn.Module, image: Tensor) -> Tensor:
    jacobian: Any = torch.autograd.functional.jacobian(lambda v: model(v[None])[0][0], image)
    return jacobian.view(image.numel(), -1)


def by_depth(name: str, depth: int, batch_size: int = 100) -> Row:
    """Return the bytes of the activations of a training step, reversible and stored."""
    with torch.device("meta"):
        step = torch.empty(batch_size, *SHAPE)
        reversed_, stored = (
            predict(MODELS[name](depth, image_shape=SHAPE, policy=policy), step).activation_bytes
            for policy in ("reverse", "store")
        )
    return {"model": name, "depth": depth, "reverse_bytes": reversed_, "store_bytes": stored}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs of `revnet train nice`")
    parser.add_argument("--num-images", type=int, default=1000, help="number of images in the round trip")
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)), help="couplings at each scale")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    parser.add_argument("--note", help="what a reader should know about the runs, for the head of the page")
    given = parser.parse_args(arguments)
    for run in given.runs:
        check_run(parser, run)
    results = [result_of(run, given.num_images) for run in given.runs]
    determinants = [log_det_error(name) for name in MODELS]
    depths = [by_depth(name, int(depth)) for name in MODELS for depth in given.depths.split(",")]
    stem = f"densities_{hardware_name()}_{datetime.date.today()}"
    given.out_dir.mkdir(parents=True, exist_ok=True)
    write_csv(results, given.out_dir / f"{stem}.csv")
    write_csv(depths, given.out_dir / f"{stem}_depth.csv")
    lines = describe_runs(["python", "benchmarks/densities.py", *arguments], given.runs, note=given.note)
    text = "\n".join(_page(lines, results, determinants, depths)).rstrip() + "\n"
    (given.out_dir / f"{stem}.md").write_text(text)
    print(text)


def next_to_published(results: list[Row]) -> list[str]:
    """Return the mean of the runs that differ only in their seeds, next to the published figure, with what differs."""
    groups: dict[tuple[str, str, int, int], list[float]] = defaultdict(list)
    for row in results:
        groups[row["data"], row["model"], row["parameters"], row["updates"]].append(row["test_bits_per_dim"])
    rows = []
    for (data, model, _, updates), bits in groups.items():
        spread = f" ± {stdev(bits):.4f}" if len(bits) > 1 else ""
        published = PUBLISHED.get((data, model))
        figure = "" if published is None else f"{published:.2f}"
        rows.append([f"{data}, {model}", f"{updates:,}", str(len(bits)), f"{mean(bits):.4f}{spread}", figure])
    return [
        "The last weights again, with the mean and the standard deviation of the seeds:",
        "",
        *table(("data, model", "updates", "seeds", "bits/dim", "published"), rows),
        "Published for CIFAR-10: NICE (Dinh et al., 2015), 5,371.78 nats for pixels scaled to [-1, 1], which are 4.48",
        "bits; RealNVP (Dinh et al., 2017); Glow (Kingma and Dhariwal, 2018). Those networks are larger, and train on",
        "the original images for hundreds of epochs; NICE whitens the images first. The runs here are much shorter. No",
        "figure is published for these digits: the papers use MNIST, which has other images.",
        "",
    ]


def _name(row: Row) -> str:
    return f"{row['data']}, {row['model']}, seed {row['seed']}"


def _page(machine: Sequence[str], results: list[Row], determinants: list[Row], depths: list[Row]) -> list[str]:
    likelihoods = [
        [
            _name(row),
            f"{row['parameters']:,}",
            f"{row['updates']:,}",
            f"{row['test_bits_per_dim']:.4f}",
            "" if row["best_test_bits_per_dim"] is None else f"{row['best_test_bits_per_dim']:.4f}",
            f"{row['train_seconds']:,.0f}",
            mib(row["reverse_bytes"]),
            mib(row["store_bytes"]),
        ]
        for row in results
    ]
    number = partial("{:.1e}".format)
    return [
        "# Densities: NICE, RealNVP and Glow",
        "",
        *machine,
        "",
        "## Bits per dimension",
        "",
        "On the test set, for one draw of the noise: an upper bound on the cost of the pixels. Best: the weights that",
        "are best on validation. Memory: the counted peak of activations in an update of 100 images.",
        "",
        *table(
            ("run", "parameters", "updates", "last", "best", "seconds", "reverse MiB", "store MiB"),
            likelihoods,
        ),
        *next_to_published(results),
        "## Round trip",
        "",
        "Test images, to their codes and back in float32. Error: the largest difference of a value in [0, 1]. A pixel",
        "changes if its noise is so close to the next level that rounding crosses it.",
        "",
        *table(
            ("run", "images", "error", "changed pixels"),
            [
                [
                    _name(row),
                    f"{row['images']:,}",
                    number(row["largest_error"]),
                    f"{row['changed_pixels']:,}",
                ]
                for row in results
            ],
        ),
        "## Log-determinant",
        "",
        "Networks for 1x8x8 pixels with two couplings per scale and random weights, in float64: the largest",
        "difference from the log-determinant of autograd's Jacobian over 8 images, and the largest condition number",
        "of a Jacobian.",
        "",
        *table(
            ("model", "mean log-determinant", "difference", "condition"),
            [
                [row["model"], f"{row['log_det']:.2f}", number(row["largest_error"]), number(row["condition"])]
                for row in determinants
            ],
        ),
        "## Memory by depth",
        "",
        "The networks of the recipes for digits with other numbers of couplings at each scale: the counted peak of",
        "activations in a training step of 100 images, in bytes.",
        "",
        *table(
            ("model, couplings", "reverse", "store"),
            [
                [f"{row['model']}, {row['depth']}", f"{row['reverse_bytes']:,}", f"{row['store_bytes']:,}"]
                for row in depths
            ],
        ),
    ]


if __name__ == "__main__":
    main()
