"""The duplication task of the Reformer: train with full attention and with LSH, evaluate with other numbers of hashes.

    python benchmarks/duplication.py --runs runs/duplication

A sequence 0w0w repeats a random word w over 127 symbols, and the model predicts the second w. Trainings are kept in the
folder of the runs, and go on where they stopped. Writes a page and its CSVs to benchmarks/results/.
"""

import argparse
import datetime
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _memory_page import Row, table, write_csv
from _pieces import Pieces
from torch import Tensor, nn

from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.models import ReversibleTransformer
from revnet.nn.attention import LSHAttention

RESULTS = Path(__file__).parent / "results"
NUM_SYMBOLS, DIM, NUM_HEADS = 127, 256, 4
NUM_BUCKETS = 16
NUM_WARMUP, SAVE_EVERY, LOG_EVERY = 50, 50, 10
NUM_TEST_BATCHES = 16

TRAINED: Mapping[str, int | None] = {"full": None, "LSH-4": 4, "LSH-2": 2, "LSH-1": 1}
"""Number of hashes of each training; None attends to all tokens."""
EVALUATED: Mapping[str, int | None] = {"full": None, "LSH-8": 8, "LSH-4": 4, "LSH-2": 2, "LSH-1": 1}
PAPER: Mapping[str, Sequence[float]] = {
    "full": (100.0, 94.8, 92.5, 76.9, 52.5),
    "LSH-4": (0.8, 100.0, 99.9, 99.4, 91.9),
    "LSH-2": (0.8, 100.0, 99.9, 98.1, 86.8),
    "LSH-1": (0.8, 99.9, 99.6, 94.8, 77.9),
}
"""Accuracies of table 2 of Kitaev et al. (2020), in the order of `EVALUATED`."""


class Duplicator(ReversibleTransformer):
    """One block of a Reformer with learned positions, as in the paper, instead of rotary ones.

    Rotary positions cannot solve the task in one block: queries are also keys, so a score without content is highest
    for the nearest tokens.

    Args:
        length: Number of tokens in a sequence.
    """

    def __init__(self, length: int):
        super().__init__(
            vocab_size=NUM_SYMBOLS + 1,
            dim=DIM,
            depth=1,
            num_heads=NUM_HEADS,
            max_length=length,
            attention="lsh",
            ff_mult=1.0,
        )
        self.positions = nn.Parameter(torch.empty(length, DIM))
        nn.init.normal_(self.positions, std=0.02)

    def embed(self, tokens: Tensor) -> Tensor:
        """Compute the input of the block: embedded tokens plus positions, once for each stream."""
        return self.enter(self.embedding(tokens) + self.positions[: tokens.shape[1]])

    def rotary(self, x: Tensor) -> None:
        """Return no rotary table."""

    def set_hashes(self, num_hashes: int | None) -> None:
        """Set the number of rounds of hashing. None puts all tokens into one bucket, so that nothing is missed."""
        for module in self.modules():
            if isinstance(module, LSHAttention):
                module.bucket_size = self.max_length if num_hashes is None else max(1, self.max_length // NUM_BUCKETS)
                module.num_hashes = num_hashes or 1


def make_batch(batch_size: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return sequences 0w0w and their targets: the second w, and -100 elsewhere.

    Args:
        batch_size: Number of sequences.
        length: Even number of tokens in a sequence, at least 4.
        seed: Seed of the words.

    Returns:
        Tokens (B, length - 1), all but the last, and the tokens after them, (B, length - 1).
    """
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, NUM_SYMBOLS + 1, (batch_size, length // 2 - 1), generator=generator)
    half = torch.cat((torch.zeros(batch_size, 1, dtype=torch.long), words), dim=1)
    tokens = torch.cat((half, half), dim=1)
    targets = tokens[:, 1:].clone()
    targets[:, : length // 2] = -100
    return tokens[:, :-1], targets


def rate_of(update: int, num_updates: int, rate: float) -> float:
    """Return the learning rate: linear warm-up, then half a cosine down to a tenth."""
    warm = min(1.0, (update + 1) / NUM_WARMUP)
    return rate * warm * (0.55 + 0.45 * math.cos(math.pi * update / num_updates))


def train(name: str, given: argparse.Namespace, settings: dict[str, Any], pieces: Pieces) -> dict[str, Any]:
    """Train with one kind of attention, from where an earlier training stopped, and evaluate with all."""
    torch.manual_seed(given.seed)
    model = Duplicator(given.length)
    model.set_hashes(TRAINED[settings["trained"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=given.rate)
    notes = pieces.load(name, settings, model, optimizer) or {"update": 0, "losses": [], "seconds": 0.0}
    start = time.process_time() - notes["seconds"]
    losses = list(notes["losses"])
    for update in range(notes["update"], given.updates):
        optimizer.param_groups[0]["lr"] = rate_of(update, given.updates, given.rate)
        # Seeds below a million are for training. Every batch has its own, so that a training can go on anywhere.
        tokens, targets = make_batch(given.batch_size, given.length, given.seed * 100_000 + update)
        loss = model(tokens, targets=targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (update + 1) % LOG_EVERY == 0:
            losses.append([update + 1, loss.item()])
        if (update + 1) % SAVE_EVERY == 0:
            seconds = time.process_time() - start
            pieces.save(name, settings, model, optimizer, {"update": update + 1, "losses": losses, "seconds": seconds})
            print(f"{name}, update {update + 1}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    seconds = time.process_time() - start
    accuracies = {kind: accuracy(model, num_hashes, given) for kind, num_hashes in EVALUATED.items()}
    return {"losses": losses, "seconds": seconds, "accuracies": accuracies}


@torch.no_grad()
def accuracy(model: Duplicator, num_hashes: int | None, given: argparse.Namespace) -> float:
    """Return the share of symbols of the second w that are predicted, with new rotations for each batch."""
    model.train()  # draws rotations at random; in evaluation mode they are always the same
    model.set_hashes(num_hashes)
    torch.manual_seed(0)
    correct = count = 0
    for batch in range(NUM_TEST_BATCHES):
        tokens, targets = make_batch(given.batch_size, given.length, 1_000_000 + batch)
        is_target = targets >= 0
        predicted = model(tokens).argmax(-1)
        correct += int((predicted == targets)[is_target].sum())
        count += int(is_target.sum())
    return correct / count


def page(results: Mapping[str, Any], given: argparse.Namespace, command: str) -> str:
    """Return the page."""
    columns = ("trained with", *EVALUATED)
    own = [[name, *[f"{100 * value:.1f} %" for value in results[name]["accuracies"].values()]] for name in TRAINED]
    published = [[name, *[f"{value} %" for value in values]] for name, values in PAPER.items()]
    seconds = sum(result["seconds"] for result in results.values())
    lines = [
        "# The duplication task of the Reformer",
        "",
        *describe_machine(command),
        "",
        f"Sequences 0w0w of {given.length} tokens, where w is a random word of {given.length // 2 - 1} symbols out of "
        f"{NUM_SYMBOLS}: the accuracy of",
        f"the symbols of the second w. One reversible block of width {DIM} with {NUM_HEADS} heads and perceptrons of "
        f"width {DIM}, trained through the",
        f"reversal. {given.updates:,} updates of {given.batch_size} sequences by Adam with rate {given.rate:g}, seed "
        f"{given.seed}; {seconds / 60:.0f} minutes of one processor for all.",
        f"*LSH-n*: n rounds of hashing with {NUM_BUCKETS} buckets. *full*: all tokens in one bucket. Evaluation draws "
        f"new rotations for each of {NUM_TEST_BATCHES}",
        "batches of new words. A guess is right in 0.8 %.",
        "",
        *table(columns, own),
        "",
        "Kitaev et al. (2020), table 2, at 1,024 tokens, after 150,000 updates:",
        "",
        *table(columns, published),
        "",
        *DIFFERENCES,
        "",
        "## Loss during training",
        "",
        *table(("update", *TRAINED), loss_cells(results)),
    ]
    return "\n".join(lines).rstrip() + "\n"


DIFFERENCES = [
    "What differs from the paper: the length and the number of updates; both streams of a reversible block reach the",
    "head; and a token sees the nearest earlier tokens of its bucket, wherever the boundaries of chunks are. Full",
    "attention is the same function here, with one bucket, so networks trained with hashing also work with it. In the",
    "paper they do not.",
]


def loss_cells(results: Mapping[str, Any], num_rows: int = 10) -> list[list[str]]:
    """Return the losses at equal distances."""
    curves = [results[name]["losses"] for name in TRAINED]
    step = max(1, len(curves[0]) // num_rows)
    chosen = range(step - 1, len(curves[0]), step)
    return [[f"{curves[0][row][0]:,}", *[f"{curve[row][1]:.3f}" for curve in curves]] for row in chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, and write the page and its CSVs."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence, an even number")
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3, help="largest learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trained", nargs="+", choices=TRAINED, help="only run these trainings, and write no page")
    parser.add_argument("--runs", type=Path, help="folder of finished and unfinished trainings")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if given.length < 4 or given.length % 2:
        parser.error("--length must be even and at least 4")
    if min(given.updates, given.batch_size) < 1 or not 0 <= given.seed < 10 or given.updates > 100_000:
        parser.error("--updates must be from 1 to 100,000, --batch-size positive, and --seed from 0 to 9")
    pieces = Pieces(given.runs)
    results = {}
    for trained in given.trained or TRAINED:
        settings: dict[str, Any] = {"trained": trained, "length": given.length, "updates": given.updates}
        settings |= {"batch": given.batch_size, "rate": given.rate, "seed": given.seed}
        name = f"duplication_{given.length}_{trained}"
        results[trained] = pieces.get(
            name, settings, lambda name=name, settings=settings: train(name, given, settings, pieces)
        )
    if given.trained:
        return
    text = page(results, given, shlex.join(["python", "benchmarks/duplication.py", *arguments]))
    stem = f"duplication_{hardware_name()}_{datetime.date.today()}"
    rows: list[Row] = [{"trained": name, **results[name]["accuracies"]} for name in TRAINED]
    write_csv(rows, given.out_dir / f"{stem}.csv")
    curves = [
        {"trained": name, "update": update, "loss": loss}
        for name in TRAINED
        for update, loss in results[name]["losses"]
    ]
    if curves:
        write_csv(curves, given.out_dir / f"{stem}_curves.csv")
    (given.out_dir / f"{stem}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
