"""Run steps on request: a process of `frontier.py`, with the library of any commit on the path.

It prints the names of its subjects, then reads names from its input and prints the processor time of a step of each.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

import revnet
from revnet.bench.host import HostRunner
from revnet.bench.host_cases import HOST_CASES
from revnet.bench.methods import Method
from revnet.nn import ReversibleBlock, ReversibleSequential

HAS_KEEP = "keep" in getattr(revnet.Reverse, "__dataclass_fields__", {})
NUM_BLOCKS = 16


def host_subject(case, policy) -> Callable[[], float]:  # type: ignore[no-untyped-def]
    """Return a turn of tiny steps."""

    def make(functions, split_dim):  # type: ignore[no-untyped-def]
        return ReversibleSequential(*[ReversibleBlock(f, g, split_dim=split_dim) for f, g in functions], policy=policy)

    return HostRunner(Method("", "", make), case, case.functions(NUM_BLOCKS, torch.device("cpu"))).turn_seconds


def digits_subject(policy) -> Callable[[], float]:  # type: ignore[no-untyped-def]
    """Return a training step of the default model on a batch of the size of digits."""
    torch.manual_seed(0)
    model = revnet.create_model("revnet38", num_classes=10, in_channels=1).to(memory_format=torch.channels_last)
    revnet.set_policy(model, policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    images, labels = torch.rand(100, 1, 8, 8), torch.arange(100) % 10

    def step() -> float:
        start = time.process_time()
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return time.process_time() - start

    return step


def subjects() -> dict[str, Callable[[], float]]:
    """Return all subjects by name."""
    turns = {}
    for case in HOST_CASES:
        turns[f"{case.name}, Store()"] = host_subject(case, revnet.Store())
        turns[f"{case.name}, Reverse()"] = host_subject(case, revnet.Reverse())
        if HAS_KEEP:
            policy = revnet.Reverse(hold=("f", "g"))
            turns[f"{case.name}, Reverse(hold=...)"] = host_subject(case, policy)
            policy = revnet.Reverse(keep=("convolution", "linear", "attention"))
            turns[f"{case.name}, Reverse(keep=...)"] = host_subject(case, policy)
    turns["digits, Store()"] = digits_subject(revnet.Store())
    turns["digits, Reverse()"] = digits_subject(revnet.Reverse())
    return turns


def main() -> None:
    """Answer requests until the input ends."""
    torch.set_num_threads(1)
    turns = subjects()
    for turn in turns.values():
        turn()
    print(json.dumps(list(turns)), flush=True)
    for line in sys.stdin:
        print(json.dumps(turns[line.strip()]()), flush=True)


if __name__ == "__main__":
    main()
