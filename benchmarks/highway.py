"""Highway, plain and residual networks by depth: training loss, gradients at initialization, and memory.

    python benchmarks/highway.py
    python benchmarks/highway.py --data ../shared/data/cifar10

Each network trains for a short budget, from the same seed on the same batches. All have width 16 and maps of 8x8. With
`--runs FOLDER`, finished trainings are kept and not run again. Writes a page, its CSVs and a picture to
benchmarks/results/.
"""

import argparse
import datetime
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _memory_page import Row, mib, table, write_csv
from _pieces import Pieces
from torch import Tensor, nn

from revnet import set_policy
from revnet._figure import clear_frame, new_figure, save, write_title
from revnet._hardware import hardware_name
from revnet._palette import BLUE, CYAN, GRAY, GREEN, PURPLE, RED
from revnet._provenance import describe_machine
from revnet.data import load_dataset
from revnet.memory import predict
from revnet.models import Highway, RevNet

RESULTS = Path(__file__).parent / "results"
WIDTH, RATE = 16, 2e-3
NUM_AVERAGED = 10
"""Number of updates over which the first and the last loss are averaged."""
GUESS = math.log(10)
"""Loss of a guess among ten classes."""
STALLED = 0.95
"""A training whose last loss is above this share of the loss of a guess has stalled."""


@dataclass(frozen=True)
class Net:
    """A kind of network, and its line in the picture."""

    options: dict[str, Any]
    color: str
    marker: str


NETS = {
    "highway": Net({"layer": "highway"}, BLUE, "o"),
    "plain": Net({"layer": "plain"}, RED, "s"),
    "residual": Net({"layer": "residual"}, GREEN, "^"),
    "plain, BN": Net({"layer": "plain", "norm": True}, PURPLE, "D"),
    "residual, BN": Net({"layer": "residual", "norm": True}, CYAN, "v"),
}


@dataclass(frozen=True)
class Images:
    """Normalized images and their labels."""

    name: str
    x: Tensor
    labels: Tensor

    @property
    def stem_stride(self) -> int:
        """The stride with which maps have 8x8 pixels."""
        return self.x.shape[-1] // 8


def load_images(data: str) -> Images:
    """Return the training images of a data set, normalized by channel."""
    dataset = load_dataset(data)
    x = dataset.train.images.float()
    mean, deviation = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    name = "digits" if data == "digits" else Path(data).name
    return Images(name, (x - mean) / deviation, dataset.train.labels)


def gate_bias(depth: int) -> float:
    """Return the initial bias of the gates: the deeper the network, the further they are closed."""
    return -2.0 if depth < 50 else -4.0


Results = dict[tuple[str, int], dict[str, Any]]
"""Result of each network, by kind and depth."""


def make(net: str, depth: int, images: Images) -> Highway:
    """Return a network of `depth` layers: the stem, the layers and the head."""
    torch.manual_seed(0)
    return Highway(
        num_layers=(depth - 2,),
        width=WIDTH,
        stem_stride=images.stem_stride,
        in_channels=images.x.shape[1],
        gate_bias=gate_bias(depth) if net == "highway" else None,
        **NETS[net].options,
    )


def train(model: Highway, images: Images, num_updates: int, batch_size: int) -> dict[str, Any]:
    """Return the loss of each update, and the norm of the first gradient of each layer."""
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(1)
    losses, norms = [], []
    start = time.process_time()
    for _ in range(num_updates):
        rows = torch.randint(len(images.x), (batch_size,), generator=generator)
        loss = F.cross_entropy(model(images.x[rows]), images.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        if not norms:
            gradients = [layer[0].transform[0].weight.grad for layer in model.stages[0]]
            norms = [gradient.norm().item() for gradient in gradients]
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
    seconds = (time.process_time() - start) / num_updates
    return {"losses": losses, "norms": norms, "seconds_per_update": seconds}


def measure(images: Images, given: argparse.Namespace, pieces: Pieces) -> Results:
    """Train all networks, or take what is finished."""
    results = {}
    for depth in given.depths:
        for net in NETS:
            settings = {
                "updates": given.updates,
                "batch": given.batch_size,
                "rate": RATE,
                "gate_bias": gate_bias(depth),
            }
            name = f"{images.name}_{net.replace(', ', '-')}_{depth}"
            results[net, depth] = pieces.get(
                name,
                settings,
                lambda net=net, depth=depth: train(make(net, depth, images), images, given.updates, given.batch_size),
            )
    return results


def last_loss(result: dict[str, Any]) -> float:
    """Return the mean loss of the last updates."""
    losses = result["losses"][-NUM_AVERAGED:]
    return sum(losses) / len(losses)


def has_stalled(result: dict[str, Any]) -> bool:
    """Return whether the last loss of a training is close to the loss of a guess, or not a number."""
    return not last_loss(result) < STALLED * GUESS


def loss_lines(results: Results, depths: Sequence[int]) -> list[str]:
    """Return the table of last losses."""
    cells = []
    for net in NETS:
        row = [net]
        for depth in depths:
            loss = last_loss(results[net, depth])
            ending = ""
            if has_stalled(results[net, depth]):
                ending = ", stalls" if loss < 2 * GUESS else ", diverges"
            row.append((f"{loss:.3f}" if loss < 1000 else f"{loss:.0e}") + ending)
        cells.append(row)
    return table(("", *[f"{depth} layers" for depth in depths]), cells)


def norm_lines(results: Results, depths: Sequence[int]) -> list[str]:
    """Return the table of gradient norms of the first and the last layer."""
    cells = []
    for net in NETS:
        ends = [(results[net, depth]["norms"][0], results[net, depth]["norms"][-1]) for depth in depths]
        cells.append([net, *[f"{first:.0e} / {last:.0e}" for first, last in ends]])
    return table(("", *[f"{depth} layers" for depth in depths]), cells)


def memory_rows(depths: Sequence[int], batch_size: int) -> list[Row]:
    """Predict the activation memory of a step of each network, and of RevNets with the same convolutions."""
    x, labels = torch.zeros(batch_size, 1, 8, 8), torch.zeros(batch_size, dtype=torch.long)
    images = Images("zeros", x, labels)
    rows: list[Row] = []

    def add(name: str, num_layers: int, model: nn.Module) -> None:
        step = predict(model, x, loss=lambda logits: F.cross_entropy(logits, labels))
        rows.append({"net": name, "num_layers": num_layers, "activation_bytes": step.activation_bytes})

    for depth in depths:
        for net in NETS:
            add(net, depth, make(net, depth, images))
        checkpointed = make("highway", depth, images)
        set_policy(checkpointed, "checkpoint")
        add("highway, checkpointed", depth, checkpointed)
        # A block has four convolutions of WIDTH channels, two in each residual function.
        num_blocks = max(1, round((depth - 2) / 4))
        reversible = RevNet(num_blocks=(num_blocks,), widths=(2 * WIDTH, 2 * WIDTH), in_channels=1)
        add("RevNet", 4 * num_blocks + 2, reversible)
    return rows


def memory_lines(rows: Sequence[Row], depths: Sequence[int]) -> list[str]:
    """Return the table of bytes."""
    names = list(dict.fromkeys(row["net"] for row in rows))
    cells = []
    for name in names:
        own = [row for row in rows if row["net"] == name]
        cells.append(
            [
                name,
                *[
                    mib(row["activation_bytes"])
                    + ("" if row["num_layers"] == depth else f" ({row['num_layers']} layers)")
                    for row, depth in zip(own, depths, strict=True)
                ],
            ]
        )
    return table(("", *[f"{depth} layers" for depth in depths]), cells)


def draw(measured: dict[str, Results], depths: Sequence[int], path: Path) -> None:
    """Draw the last losses by depth, and the gradient norms by layer of the deepest networks."""
    figure = new_figure(9.0, 3.6 * len(measured))
    for (name, results), (losses, norms) in zip(
        measured.items(), figure.subplots(len(measured), 2, squeeze=False), strict=True
    ):
        for net, line in NETS.items():
            style = {"color": line.color, "marker": line.marker, "label": net, "markersize": 4}
            last = [min(last_loss(results[net, depth]), 2 * GUESS) for depth in depths]
            losses.plot(depths, last, **style)
            first = results[net, max(depths)]["norms"]
            places = [place for place, norm in enumerate(first) if 0 < norm < math.inf]
            norms.plot(places, [first[place] for place in places], **style, markevery=max(1, len(first) // 8))
        losses.axhline(GUESS, color=GRAY, linestyle=":")
        losses.annotate("a guess", (max(depths), GUESS), ha="right", va="bottom", color=GRAY, fontsize="small")
        losses.set(xlabel="layers", ylabel="training loss")
        write_title(losses, f"{name}: loss after the budget")
        norms.set(yscale="log", xlabel="layer between stem and head", ylabel="norm of the gradient")
        write_title(norms, f"{name}: gradients at first, {max(depths)} layers")
        clear_frame(losses)
        clear_frame(norms)
    figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=len(NETS))
    save(figure, path)


INTRODUCTION = [
    "All layers are 3x3 convolutions of 16 channels on maps of 8x8 pixels. Stem and head are layers. A plain layer",
    "computes H = ReLU(conv(x)), a residual layer x + H, and a highway layer T H + (1 - T) x with a gate",
    "T = sigmoid(conv(x)). The initial bias of the gates is -2 below 50 layers and -4 from there on. *BN*: batch norm",
    f"after each convolution and after the last layer. All networks train with Adam, rate {RATE}, from one seed, on",
    "the same batches.",
]
DIFFERENCES = [
    "Srivastava et al. (2015) trained fully connected networks of 10 to 100 layers on MNIST by SGD to convergence,",
    "each with the best of many settings of the learning rate and of other options. The deeper a plain network, the",
    "higher was its loss, while highway networks of 100 layers trained as well as shallow ones. The networks here are",
    "convolutional and small, have one rate for all, and train for a short budget. A slow network counts as stalled.",
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the page, its CSVs and its picture."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data", nargs="+", default=["digits"], help="`digits`, or folders of images, such as CIFAR-10"
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 20, 50, 110], help="numbers of layers")
    parser.add_argument("--updates", type=int, default=120)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--runs", type=Path, help="folder of finished trainings")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if min(given.depths) < 3 or min(given.updates, given.batch_size) < 1:
        parser.error("--depths must be at least 3; --updates and --batch-size must be positive")
    missing = [data for data in given.data if data != "digits" and not Path(data).expanduser().is_dir()]
    for data in missing:
        print(f"skipped: {data} is not a folder", file=sys.stderr)
    if len(missing) == len(given.data):
        parser.error("--data names no folder that exists")
    measured = {}
    for data in given.data:
        if data not in missing:
            images = load_images(data)
            measured[images.name] = measure(images, given, Pieces(given.runs))
    write_page(measured, given, shlex.join(["python", "benchmarks/highway.py", *arguments]))


def write_page(measured: dict[str, Results], given: argparse.Namespace, command: str) -> None:
    """Write the page, its CSVs and its picture."""
    stem = f"highway_{hardware_name()}_{datetime.date.today()}"
    draw(measured, given.depths, given.out_dir / f"{stem}.png")
    lines = ["# Highway networks by depth", "", *describe_machine(command), "", *INTRODUCTION, ""]
    lines += [f"![Losses by depth and gradients by layer]({stem}.png)", ""]
    lines += ["Losses are cut at twice the loss of a guess. Gradients that overflow are left out.", ""]
    rows: list[Row] = []
    for name, results in measured.items():
        seconds = sum(result["seconds_per_update"] for result in results.values()) * given.updates
        lines += [
            f"## Loss on {name}",
            "",
            f"Training loss, the mean of the last {NUM_AVERAGED} of {given.updates} updates with {given.batch_size} "
            f"images. A guess has {GUESS:.3f};",
            f"*stalls*: above {STALLED:.0%} of that; *diverges*: above twice that. All trainings took "
            f"{seconds / 60:.1f} minutes of one",
            "processor.",
            "",
            *loss_lines(results, given.depths),
            "",
            "Norm of the first gradient of the first layer / of the last layer:",
            "",
            *norm_lines(results, given.depths),
            "",
        ]
        for (net, depth), result in results.items():
            for start in range(0, len(result["losses"]), NUM_AVERAGED):
                losses = result["losses"][start : start + NUM_AVERAGED]
                row = {"data": name, "net": net, "num_layers": depth, "update": start + len(losses)}
                rows.append(row | {"mean_loss": sum(losses) / len(losses)})
    memory = memory_rows(given.depths, given.batch_size)
    lines += [
        "## Memory",
        "",
        f"Predicted peak of activations in a step of {given.batch_size} images, in MiB. The RevNet has two streams of",
        "16 channels, so its convolutions are as wide. It is as deep as whole blocks allow. *Checkpointed*: each layer",
        "keeps only its input. Only the RevNet's peak does not grow with depth.",
        "",
        *memory_lines(memory, given.depths),
        "",
        "## Next to the paper",
        "",
        *DIFFERENCES,
    ]
    write_csv(rows, given.out_dir / f"{stem}.csv")
    write_csv(norm_rows(measured), given.out_dir / f"{stem}_gradients.csv")
    write_csv(memory, given.out_dir / f"{stem}_memory.csv")
    text = "\n".join(lines).rstrip() + "\n"
    (given.out_dir / f"{stem}.md").write_text(text)
    print(text)


def norm_rows(measured: dict[str, Results]) -> list[Row]:
    """Return the gradient norms as rows."""
    return [
        {"data": name, "net": net, "num_layers": depth, "layer": layer, "gradient_norm": norm}
        for name, results in measured.items()
        for (net, depth), result in results.items()
        for layer, norm in enumerate(result["norms"])
    ]


if __name__ == "__main__":
    main()
