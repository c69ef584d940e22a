"""Bytes and seconds of a training step on 1, 2 and 4 processes, replicated and sharded by block.

    OMP_NUM_THREADS=1 python benchmarks/sharding.py

A small reversible transformer trains on the CPU, with gloo between the processes. For each number of processes and each
way to distribute the model, the command counts the bytes of parameters, gradients and optimizer state in the first
process, the bytes that a forward pass holds, and the peak of a step, at two depths. It writes a page and its CSV to
benchmarks/results/.
"""

import argparse
import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _memory_page import Row, table, write_csv
from _processes import run_in_processes
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from revnet import set_policy
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.bench._resized_bytes import ResizedBytes
from revnet.distributed import shard_blocks
from revnet.models import ReversibleTransformer

RESULTS = Path(__file__).parent / "results"
VOCABULARY = 256
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)

WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DDP": DistributedDataParallel,
    "sharded by block": shard_blocks,
    "sharded by function": lambda model: shard_blocks(model, unit="function"),
    "sharded by block, bfloat16": lambda model: shard_blocks(model, mp_policy=BF16),
    "sharded by block, stored": lambda model: shard_blocks(_stored(model)),
}


def _stored(model: nn.Module) -> nn.Module:
    set_policy(model, "store")
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the page, and write it with its CSV."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--processes", default="1,2,4", help="numbers of processes (default: %(default)s)")
    parser.add_argument("--depths", default="4,16", help="two numbers of blocks (default: %(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="features of a stream (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences on all processes (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--num-steps", type=int, default=5, help="timed steps (default: %(default)s)")
    parser.add_argument("--out-dir", type=Path, default=RESULTS, help="folder (default: benchmarks/results)")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for num_processes in map(int, options.processes.split(",")):
        # The rows of the first process.
        rows += run_in_processes(_measure_all, vars(options), num_processes=num_processes)[0]
    page = "\n".join(_page(rows, options))
    print(page)
    stem = options.out_dir / f"sharding_{hardware_name()}_{datetime.date.today()}"
    stem.with_suffix(".md").write_text(page)
    write_csv(rows, stem.with_suffix(".csv"))


def _measure_all(settings: dict[str, Any]) -> list[Row]:
    rows = []
    for depth in map(int, settings["depths"].split(",")):
        runs = {way: _Run(depth, distribute, settings) for way, distribute in WAYS.items()}
        bytes_of = {way: run.count_bytes() for way, run in runs.items()}
        # In turns, so that the load of the machine affects all ways alike.
        rounds = [{way: run.seconds() for way, run in runs.items()} for _ in range(settings["num_steps"])]
        for way in WAYS:
            row = {"processes": dist.get_world_size(), "way": way, "depth": depth, **bytes_of[way]}
            rows.append(row | {"step_seconds": round(min(seconds[way] for seconds in rounds), 4)})
    return rows


class _Run:
    """A model that trains on this process's part of a batch."""

    def __init__(self, depth: int, distribute: Callable[[nn.Module], nn.Module], settings: dict[str, Any]):
        torch.manual_seed(0)
        dim, batch_size = settings["dim"], settings["batch_size"] // dist.get_world_size()
        model = ReversibleTransformer(vocab_size=VOCABULARY, dim=dim, depth=depth, num_heads=max(1, dim // 32))
        self.model = distribute(model)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.tokens = torch.randint(VOCABULARY, (batch_size, settings["length"]))
        for _ in range(2):  # gathers buckets and fills caches
            self.step()

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def loss(self) -> Tensor:
        return F.cross_entropy(self.model(self.tokens).float().flatten(0, 1), self.tokens.flatten())

    def seconds(self) -> float:
        """Return the seconds of a step."""
        dist.barrier()
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start

    def count_bytes(self) -> Row:
        """Return the bytes of this process."""
        parameters = list(self.model.parameters())
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        row = {
            "parameter_bytes": _local_bytes(parameters),
            "gradient_bytes": _local_bytes([parameter.grad for parameter in parameters]),
            "state_bytes": _local_bytes(states),
        }
        del states
        self.optimizer.zero_grad()
        dist.barrier()
        with ResizedBytes([parameter for parameter in parameters if not isinstance(parameter, DTensor)]) as counter:
            loss = self.loss()
            row["held_bytes"] = min(_settled(counter) for _ in range(5))
            loss.backward()
        return row | {"peak_bytes": counter.peak_bytes}


def _settled(counter: ResizedBytes) -> int:
    """Return the bytes that are alive after a pause, since gloo's threads hold on to their buffers for a while."""
    time.sleep(0.02)
    return counter.live_bytes


def _local_bytes(tensors: Sequence[Any]) -> int:
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


def _page(rows: Sequence[Row], options: argparse.Namespace) -> list[str]:
    command = "python benchmarks/sharding.py"
    columns = ["parameters", "gradients", "AdamW state", "held", "peak of a step", "step s"]
    keys = ["parameter_bytes", "gradient_bytes", "state_bytes", "held_bytes", "peak_bytes"]
    lines = [
        "# Sharding by block",
        "",
        *describe_machine(command),
        "",
        f"A reversible transformer with {options.dim} features in each stream trains on {options.batch_size} sequences",
        f"of {options.length} tokens, divided among the processes. Bytes are counted in the first process. Held:",
        "activations between forward and backward pass, and the gathered parameters of stem and head. Peak: the",
        "largest sum of all tensors that a step creates, with gradients, gathered parameters and DDP's buckets.",
        f"Seconds: the fastest of {options.num_steps} steps; the ways take turns.",
        "",
    ]
    for depth in dict.fromkeys(row["depth"] for row in rows):
        lines += [f"## {depth} blocks", ""]
        cells = [
            [f"{row['way']}, {row['processes']}", *[f"{row[key]:,}" for key in keys], f"{row['step_seconds']:.3f}"]
            for row in rows
            if row["depth"] == depth
        ]
        lines += table(["way, processes", *columns], cells)
    return lines


if __name__ == "__main__":
    main()
