"""Fine-tune networks that were converted to reversible ones, next to ordinary fine-tuning of the same weights.

    python benchmarks/finetuning.py --data ../shared/data --runs runs/finetuning

A ResNet-32 and a ViT are trained on five classes of CIFAR-10, and a GPT on tiny Shakespeare. Each is then adapted to
another task, with each method of `revnet.convert` and two seeds, through the reversal. Finished pieces are kept in the
folder of the runs and not run again. Writes a page and its CSV to benchmarks/results/.
"""

import argparse
import copy
import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from _finetuning_nets import BATCH, NETS, Net, Split
from _memory_page import Row, mib, table, write_csv
from _pieces import Pieces
from torch import Tensor, nn

import revnet
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.conversion import BDIA, AbstractMethod, Consistent, Dr2Net, Rewire, set_method
from revnet.memory import predict
from revnet.nn import add_policies

RESULTS = Path(__file__).parent / "results"
TIMED_ROUNDS = 7


def batches(split: Split, generator: torch.Generator, batch_size: int = BATCH) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches of one epoch."""
    order = torch.randperm(len(split.x), generator=generator)
    for start in range(0, len(order) - batch_size + 1, batch_size):
        rows = order[start : start + batch_size]
        yield split.x[rows], split.targets[rows]


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift images by up to four pixels; texts stay as they are."""
    if x.dim() != 4:
        return x
    left, top = torch.randint(0, 9, (2,), generator=generator).tolist()
    return F.pad(x, (4, 4, 4, 4))[..., top : top + x.shape[-2], left : left + x.shape[-1]]


def train(
    model: nn.Module,
    split: Split,
    num_epochs: int,
    rate: float,
    seed: int,
    name: str,
    before_update: Callable[[int], None] = lambda update: None,
    batch_size: int = BATCH,
) -> None:
    """Train with AdamW and a one-cycle rate."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    num_updates = num_epochs * (len(split.x) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, num_updates, pct_start=0.2)
    model.train()
    for epoch in range(num_epochs):
        start, total = time.perf_counter(), 0.0
        for x, targets in batches(split, generator, batch_size):
            before_update(schedule.last_epoch)
            loss = F.cross_entropy(model(augment(x, generator)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() / (len(split.x) // batch_size)
        seconds = time.perf_counter() - start
        print(f"{name}, epoch {epoch + 1}: training loss {total:.4f}, {seconds:.0f} s", file=sys.stderr, flush=True)


@torch.no_grad()
def test(model: nn.Module, split: Split) -> tuple[float, float]:
    """Return the loss and the accuracy on the test part."""
    model.eval()
    loss, correct = 0.0, 0
    for x, targets in zip(split.test_x.split(200), split.test_targets.split(200), strict=True):
        output = model(x)
        loss += F.cross_entropy(output, targets, reduction="sum").item()
        correct += int((output.argmax(1) == targets).sum())
    return loss / split.test_targets.numel(), correct / split.test_targets.numel()


def pretrained(name: str, net: Net, data: Path, runs: Path) -> nn.Module:
    """Return the network trained on its first task, from the folder of the runs if it is there."""
    path = runs / f"{name}.pt"
    if net.first is None:
        torch.manual_seed(0)
        return net.make(10)
    if not path.exists():
        split = net.first(data)
        torch.manual_seed(0)
        model = net.make(split.num_outputs)
        train(model, split, net.num_epochs[0], net.rates[0], 0, name)
        loss, accuracy = test(model, split)
        torch.save({"model": model.state_dict(), "num_outputs": split.num_outputs, "accuracy": accuracy}, path)
        print(f"{name}: test loss {loss:.4f}, accuracy {accuracy:.4f}", file=sys.stderr, flush=True)
    saved = torch.load(path)
    model = net.make(saved["num_outputs"])
    model.load_state_dict(saved["model"])
    return model


class ResidualDropout:
    """A hook of an ordinary block that drops elements of its residual."""

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, block: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the input plus what is left of the residual."""
        (x,) = inputs
        return output if x.shape != output.shape else x + F.dropout(output - x, self.rate, block.training)


@dataclass(frozen=True)
class Method:
    """One way to adapt a network."""

    convert: AbstractMethod | None = None
    ramp_from: AbstractMethod | None = None
    """Method at the start, from which the coefficients move to the end in the first half of the updates."""
    dropout: float = 0.0
    checkpoints: bool = False


# The noise of BDIA multiplies residuals by 1 + g. Dropout with p / (1 - p) = g^2 has the same variance.
METHODS: Mapping[str, Method] = {
    "ordinary": Method(),
    "dropout 0.2": Method(dropout=0.2),
    "dropout 0.06": Method(dropout=1 / 17),
    "BDIA 1/2": Method(BDIA(0.5)),
    "BDIA 1/4": Method(BDIA(0.25)),
    "Consistent 1/4": Method(Consistent(0.25)),
    "Consistent 0.7": Method(Consistent(0.7)),
    "Dr2Net, ramp to 1/4": Method(Dr2Net(0.75, 0.25, 14), Dr2Net(1.0, 0.0, 14)),
    "Rewire": Method(Rewire()),
}


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of the lists of a network."""
    return [block for name in model.lists for block in model.get_submodule(name)]


def prepare(model: nn.Module, method: Method) -> None:
    """Convert a network, or add dropout to it."""
    if method.dropout:
        for block in blocks_of(model):
            block.register_forward_hook(ResidualDropout(method.dropout))
    if method.convert is not None:
        revnet.convert(model, method.ramp_from or method.convert, blocks=model.lists)


def adapted(model: nn.Module, net: Net, split: Split) -> nn.Module:
    """Return a copy of a trained network with a new head, if the task needs one."""
    model = copy.deepcopy(model)
    if not net.keeps_head:
        torch.manual_seed(1)
        model.head = nn.Linear(model.head.in_features, split.num_outputs)
    return model


def run_once(name: str, net: Net, model: nn.Module, split: Split, method_name: str, seed: int) -> Row:
    """Adapt a trained network with one method, and return what came out."""
    method = METHODS[method_name]
    model = adapted(model, net, split)
    prepare(model, method)
    num_updates = net.num_epochs[1] * (len(split.x) // net.batch_size)
    num_moving = max(1, num_updates // 2)

    def move(update: int) -> None:
        if method.ramp_from is not None and update <= num_moving:
            set_method(model, method.ramp_from.between(method.convert, update / num_moving))

    start = time.process_time()
    what = f"{name}, {method_name}, seed {seed}"
    train(model, split, net.num_epochs[1], net.rates[1], seed, what, move, net.batch_size)
    seconds = (time.process_time() - start) / num_updates
    if method.convert is not None and any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        torch.optim.swa_utils.update_bn((x for x, _ in batches(split, torch.Generator().manual_seed(seed))), model)
    loss, accuracy = test(model, split)
    row: Row = {"net": name, "method": method_name, "seed": seed, "test_loss": loss, "accuracy": accuracy}
    row |= {"seconds_per_update": seconds, "gradient_error": gradient_error(model, split, method)}
    model.train()
    x, targets = split.x[:BATCH], split.targets[:BATCH]
    row["activation_bytes"] = predict(model, x, loss=lambda output: F.cross_entropy(output, targets)).activation_bytes
    return row


def gradients(model: nn.Module, split: Split) -> list[Tensor]:
    """Return the gradients of one step in training mode."""
    torch.manual_seed(3)
    loss = F.cross_entropy(model.train()(split.x[:BATCH]), split.targets[:BATCH])
    return list(torch.autograd.grad(loss, list(model.parameters())))


def gradient_error(model: nn.Module, split: Split, method: Method) -> float:
    """Return the relative difference between the gradients of the converted network and of its stored twin."""
    if method.convert is None:
        return 0.0
    twin = copy.deepcopy(model)
    revnet.set_policy(twin, "store")
    pairs = list(zip(gradients(model, split), gradients(twin, split), strict=True))
    difference = sum(float((one - other).double().square().sum()) for one, other in pairs)
    return (difference / sum(float(other.double().square().sum()) for _, other in pairs)) ** 0.5


def check_equal_updates(net: Net, model: nn.Module, split: Split) -> list[str]:
    """Return the ways whose weights equal the ones of a stored run bit for bit after 20 updates."""
    few = replace(split, x=split.x[:160], targets=split.targets[:160])
    equal = []
    for name, method in {"checkpointed": Method(checkpoints=True), **METHODS}.items():
        if method.convert is None and not method.checkpoints:
            continue
        results = []
        for is_stored in (True, False):
            copied = adapted(model, net, split)
            prepare(copied, method)
            if method.checkpoints and not is_stored:
                add_policies(copied, blocks_of(copied))
                revnet.set_policy(copied, "checkpoint")
            if method.convert is not None and is_stored:
                revnet.set_policy(copied, "store")
            train(copied, few, 2, net.rates[1], 0, f"20 updates, {name}", batch_size=16)
            results.append(copied.state_dict())
        if all(torch.equal(results[0][key], results[1][key]) for key in results[0]):
            equal.append(name)
    return equal


def update_times(net: Net, model: nn.Module, split: Split, methods: Sequence[str]) -> dict[str, float]:
    """Return the processor time of an update with each method relative to the first one, taken in turns."""
    updates: dict[str, Callable[[], None]] = {}
    for name in methods:
        method = METHODS[name]
        copied = adapted(model, net, split).train()
        prepare(copied, replace(method, ramp_from=None))
        updates[name] = partial(_update, copied, torch.optim.AdamW(copied.parameters()), split, net.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(1 + TIMED_ROUNDS):
        for name in methods:
            start = time.process_time()
            updates[name]()
            seconds[name].append(time.process_time() - start)
    usual = seconds[methods[0]][1:]
    return {
        name: statistics.median(own / other for own, other in zip(values[1:], usual, strict=True))
        for name, values in seconds.items()
    }


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, split: Split, batch_size: int) -> None:
    loss = F.cross_entropy(model(split.x[:batch_size]), split.targets[:batch_size])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the page."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10 and tinyshakespeare")
    parser.add_argument("--runs", type=Path, required=True, help="folder of finished pieces")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--only-train", action="store_true", help="train the networks on their first tasks, and stop")
    parser.add_argument("--only-run", action="store_true", help="run the pieces, and write no page")
    given = parser.parse_args(arguments)
    pieces, results = Pieces(given.runs), {}
    for name in given.nets:
        model = pretrained(name, NETS[name], given.data, given.runs)
        if not given.only_train:
            results[name] = adapt(name, NETS[name], model, given.data, pieces, given.seeds)
    if not (given.only_train or given.only_run):
        write_page(results, given.runs, shlex.join(["python", "benchmarks/finetuning.py", *arguments]))


@dataclass(frozen=True)
class Adaptation:
    """What came out of adapting one network."""

    equal: list[str]
    """Ways whose weights equal the ones of a stored run after 20 updates."""
    rows: list[Row]
    """A row for each method and seed."""
    times: dict[str, float]
    """Processor time of an update with each method, relative to ordinary fine-tuning."""


def adapt(name: str, net: Net, model: nn.Module, data: Path, pieces: Pieces, seeds: Sequence[int]) -> Adaptation:
    """Run the pieces of one network that are missing."""
    split = net.second(data)
    settings = {"num_epochs": net.num_epochs, "rates": net.rates, "num_samples": len(split.x)}
    settings |= {"batch_size": net.batch_size} if net.batch_size != BATCH else {}
    equal = pieces.get(f"{name}-equal", settings, lambda: {"methods": check_equal_updates(net, model, split)})
    rows = []
    for seed in seeds:
        for method in net.methods or METHODS:
            stem = "".join(character if character.isalnum() else "_" for character in method)
            run = partial(run_once, name, net, model, split, method, seed)
            rows.append(pieces.get(f"{name}-{stem}-{seed}", settings | {"method": str(METHODS[method])}, run))
    times = pieces.get(f"{name}-time", settings, lambda: update_times(net, model, split, net.methods or list(METHODS)))
    return Adaptation(equal["methods"], rows, times)


def write_page(results: Mapping[str, Adaptation], runs: Path, command: str) -> None:
    """Write the page and its CSV."""
    rows: list[Row] = []
    lines = ["# Fine-tuning after conversion", "", *describe_machine(command), "", *INTRODUCTION, ""]
    for name, found in results.items():
        rows += found.rows
        net = NETS[name]
        first = f"{100 * torch.load(runs / f'{name}.pt')['accuracy']:.1f} %" if net.first else "none"
        lines += [
            f"## {name}",
            "",
            f"Accuracy on the first task: {first}. After 20 updates, weights and statistics equal the",
            f"ones of a stored run bit for bit for: {', '.join(found.equal)}.",
            "",
            *table(COLUMNS, [cells_of(method, found) for method in net.methods or METHODS]),
            "",
        ]
    theme = "finetuning" if len(results) == len(NETS) else "-".join(("finetuning", *results))
    stem = f"{theme}_{hardware_name()}_{datetime.date.today()}"
    write_csv(rows, RESULTS / f"{stem}.csv")
    (RESULTS / f"{stem}.md").write_text("\n".join(lines).rstrip() + "\n")
    print("\n".join(lines))


COLUMNS = ("method", "accuracy, %", "difference", "test loss", "gradient error", "activations, MiB", "time")
INTRODUCTION = [
    "Networks trained on one task and adapted to another, through the reversal, 2 seeds (mean and half of the range).",
    "ResNet-32 and ViT: five classes of CIFAR-10, then the other five, 1,000 training images and 5,000 for the test.",
    "*vit-scratch*: the same ViT from random weights on 5,000 images of ten classes.",
    "GPT: tiny Shakespeare, then 120,000 characters of Python's manual; accuracy is the share of characters. The",
    "second tasks of ViT and GPT run in batches of 16, everything else in batches of 64. *Difference*: to ordinary",
    "fine-tuning, in points. *Gradient error*: relative difference to the stored twin after training; 0 is equal bit",
    "for bit. *Time*: processor time of an update relative to ordinary, taken in turns.",
    "Dropout acts on the residual of each block, with the variance of BDIA's noise of 1/2 and 1/4.",
]


def cells_of(method: str, found: Adaptation) -> list[str]:
    """Return the cells of one method."""
    own = [row for row in found.rows if row["method"] == method]
    usual = [row for row in found.rows if row["method"] == "ordinary"]

    def mean(of: Sequence[Row], key: str) -> float:
        return statistics.fmean(row[key] for row in of)

    accuracies = [100 * row["accuracy"] for row in own]
    return [
        method,
        f"{statistics.fmean(accuracies):.1f} +- {(max(accuracies) - min(accuracies)) / 2:.1f}",
        f"{statistics.fmean(accuracies) - 100 * mean(usual, 'accuracy'):+.1f}",
        f"{mean(own, 'test_loss'):.3f}",
        f"{max(row['gradient_error'] for row in own):.0e}" if mean(own, "gradient_error") else "0",
        mib(own[0]["activation_bytes"]),
        f"{found.times[method]:.2f}",
    ]


if __name__ == "__main__":
    main()
