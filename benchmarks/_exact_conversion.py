"""The part of `exact.py` that times converted networks: seconds of a step relative to the ordinary network."""

import copy
import gc
import statistics
import time

import torch
import torch.nn.functional as F
from _finetuning_nets import CONTEXT, IMAGE_SIZE, ResNet32, SmallGPT
from _memory_page import Row, Section, table
from torch import Tensor, nn

import revnet
from revnet.conversion import BDIA, AbstractMethod, Consistent, Rewire

METHODS: dict[str, AbstractMethod] = {
    "Rewire()": Rewire(),
    "Rewire(14)": Rewire(14),
    "Consistent(0.25)": Consistent(0.25),
    "Consistent(0.7)": Consistent(0.7),
    "BDIA(0.25)": BDIA(0.25),
}
NUM_CLASSES = 96


def networks(batch_size: int) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """Return networks with an input and targets."""
    torch.manual_seed(0)
    images, labels = torch.randn(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE), torch.randint(0, NUM_CLASSES, (batch_size,))
    texts = torch.randint(0, NUM_CLASSES, (batch_size // 4, CONTEXT + 1))
    return [
        (f"ResNet-32, {batch_size} images", ResNet32(NUM_CLASSES), images, labels),
        (f"GPT, {batch_size // 4} x {CONTEXT} tokens", SmallGPT(NUM_CLASSES), texts[:, :-1], texts[:, 1:]),
    ]


def ways_of(network: nn.Module) -> dict[str, nn.Module]:
    """Return the ordinary network, and its conversions, reversed and stored."""
    ways = {"ordinary": network}
    for name, method in METHODS.items():
        converted = copy.deepcopy(network)
        revnet.convert(converted, method, blocks=network.lists)
        ways[name] = converted
        ways[f"{name}, stored"] = copy.deepcopy(converted)
        revnet.set_policy(ways[f"{name}, stored"], "store")
    return ways


def seconds_of_parts(model: nn.Module, x: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return the processor time of a forward and of a backward pass."""
    model.zero_grad(set_to_none=False)
    gc.collect()
    start = time.process_time()
    loss = F.cross_entropy(model(x), targets)
    middle = time.process_time()
    loss.backward()
    return middle - start, time.process_time() - middle


def conversion_section(num_rounds: int, batch_size: int) -> Section:
    """Time the steps of every way, interleaved."""
    rows: list[Row] = []
    for name, network, x, targets in networks(batch_size):
        ways = ways_of(network)
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for number in range(num_rounds + 1):
            names = list(ways)
            for way in names[number % len(names) :] + names[: number % len(names)]:
                times[way].append(seconds_of_parts(ways[way], x, targets))
        # The first round warms up.
        usual = [sum(parts) for parts in times["ordinary"][1:]]
        for way, parts in times.items():
            row: Row = {"network": name, "way": way}
            for column, values in zip(("forward", "backward"), zip(*parts[1:], strict=True), strict=True):
                row[column] = round(statistics.median(map(_ratio, values, usual)), 3)
            row["step"] = round(statistics.median(map(_ratio, map(sum, parts[1:]), usual)), 3)
            rows.append(row)
        print(*rows[-len(ways) :], sep="\n", flush=True)
    columns = ["network", "way", "forward", "backward", "step"]
    lines = [
        f"Networks of `finetuning.py`. Medians over {num_rounds} rounds of the processor time relative to an ordinary",
        "step; each round runs one step of every way.",
        "",
        *table(columns, [[str(row[column]) for column in columns] for row in rows]),
    ]
    return Section(["## Converted networks", "", *lines], rows)


def _ratio(value: float, usual: float) -> float:
    return value / usual
