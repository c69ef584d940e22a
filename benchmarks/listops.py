"""ListOps of the Long Range Arena at shorter lengths: hierarchical attention next to full attention and to chance.

    python benchmarks/listops.py --runs runs/listops

A sequence such as [MAX 4 [MIN 2 7 ] 0 ] has one of ten answers. Trainings are kept in the folder of the runs, and go on
where they stopped. At 16,384 tokens, only the memory and the time of a step are measured. Writes a page and its CSVs to
benchmarks/results/.
"""

import argparse
import datetime
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _listops_task import VOCABULARY, Examples, load_examples
from _memory_page import Row, mib, table, write_csv
from _pieces import Pieces
from torch import Tensor, nn

from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.memory import predict
from revnet.models import ReversibleTransformer

RESULTS = Path(__file__).parent / "results"
DIM, DEPTH, NUM_HEADS, BLOCK_SIZE = 64, 2, 4, 16
NUM_CLASSES, NUM_WARMUP, SAVE_EVERY, LOG_EVERY = 10, 40, 40, 10
ATTENTIONS = ("hierarchical", "full")
LONG = 16_384


class SequenceClassifier(nn.Module):
    """A reversible encoder and a linear layer on the features of the first token.

    Args:
        attention: "full" or "hierarchical".
        max_length: Largest number of tokens.
    """

    def __init__(self, attention: str, max_length: int = LONG):
        super().__init__()
        self.encoder = ReversibleTransformer(
            vocab_size=len(VOCABULARY),
            dim=DIM,
            depth=DEPTH,
            num_heads=NUM_HEADS,
            max_length=max_length,
            is_causal=False,
            attention=attention,
            block_size=BLOCK_SIZE,
        )
        self.encoder.head = nn.Identity()  # the head of a language model, which is not used
        self.head = nn.Linear(self.encoder.num_features, NUM_CLASSES)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Compute the logits of the answers."""
        return self.head(self.encoder.forward_features(tokens, mask)[:, 0])


def train(
    name: str, given: argparse.Namespace, settings: dict[str, Any], pieces: Pieces, examples: Mapping[str, Examples]
) -> dict[str, Any]:
    """Train with one kind of attention, from where an earlier training stopped, and test."""
    torch.manual_seed(settings["seed"])
    model = SequenceClassifier(settings["attention"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.rate, weight_decay=0.01)
    notes = pieces.load(name, settings, model, optimizer) or {"update": 0, "losses": [], "seconds": 0.0}
    start = time.process_time() - notes["seconds"]
    losses = list(notes["losses"])
    window = []
    for update in range(notes["update"], given.updates):
        warm = min(1.0, (update + 1) / NUM_WARMUP)
        optimizer.param_groups[0]["lr"] = given.rate * warm * (1 - 0.9 * update / given.updates)
        # Each batch has its own seed, so that a training can go on anywhere.
        tokens, mask, answers = examples["train"].batch(given.batch_size, settings["seed"] * 1_000_000 + update)
        loss = F.cross_entropy(model(tokens, mask), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        window.append(loss.item())
        if (update + 1) % LOG_EVERY == 0:
            losses.append([update + 1, statistics.fmean(window)])
            window = []
        if (update + 1) % SAVE_EVERY == 0:
            seconds = time.process_time() - start
            pieces.save(name, settings, model, optimizer, {"update": update + 1, "losses": losses, "seconds": seconds})
            print(f"{name}, update {update + 1}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    seconds = time.process_time() - start
    return {"losses": losses, "seconds": seconds, "accuracy": accuracy(model, examples["test"], given.batch_size)}


@torch.no_grad()
def accuracy(model: SequenceClassifier, examples: Examples, batch_size: int) -> float:
    """Return the share of right answers."""
    model.eval()
    correct = 0
    for start in range(0, len(examples), batch_size):
        tokens, mask, answers = examples.rows(range(start, min(start + batch_size, len(examples))))
        correct += int((model(tokens, mask).argmax(-1) == answers).sum())
    return correct / len(examples)


def baselines(examples: Mapping[str, Examples]) -> dict[str, float]:
    """Return the accuracy of answers that do not read the sequence, or only its first token."""
    train_, test = examples["train"], examples["test"]
    (most_common, _), *_ = Counter(train_.answers).most_common(1)
    by_operator = {
        operator: Counter(
            answer for tokens, answer in zip(train_.sequences, train_.answers, strict=True) if tokens[0] == operator
        ).most_common(1)[0][0]
        for operator in {tokens[0] for tokens in train_.sequences}
    }
    guesses = {
        "a guess": 1 / NUM_CLASSES,
        "the most common answer": statistics.fmean(answer == most_common for answer in test.answers),
        "the most common answer for the first operator": statistics.fmean(
            answer == by_operator.get(tokens[0], most_common)
            for tokens, answer in zip(test.sequences, test.answers, strict=True)
        ),
    }
    return {name: float(share) for name, share in guesses.items()}


def long_step(attention: str, length: int) -> dict[str, Any]:
    """Predict the activation memory of a step on one long sequence, and measure its time."""
    torch.manual_seed(0)
    model = SequenceClassifier(attention, length)
    tokens = torch.randint(len(VOCABULARY), (1, length))
    mask = torch.ones(1, length, dtype=torch.bool)
    step = predict(model, tokens, mask)
    start = time.process_time()
    model(tokens, mask).sum().backward()
    return {"activation_bytes": step.activation_bytes, "seconds": time.process_time() - start}


def page(
    results: Mapping[tuple[str, int], Any],
    long: Mapping[str, Any],
    examples: Mapping[str, Examples],
    given: argparse.Namespace,
    command: str,
) -> str:
    """Return the page."""
    cells = []
    for attention in ATTENTIONS:
        shares = [100 * results[attention, seed]["accuracy"] for seed in given.seeds]
        seconds = [results[attention, seed]["seconds"] / given.updates for seed in given.seeds]
        last = [results[attention, seed]["losses"][-1][1] for seed in given.seeds]
        cells.append(
            [
                f"{attention} attention",
                " / ".join(f"{share:.1f} %" for share in shares),
                f"{statistics.fmean(shares):.1f} %",
                " / ".join(f"{loss:.3f}" for loss in last),
                f"{statistics.fmean(seconds):.2f}",
            ]
        )
    cells += [[name, "", f"{100 * share:.1f} %", "", ""] for name, share in baselines(examples).items()]
    minutes = sum(result["seconds"] for result in results.values()) / 60
    lengths = [len(tokens) for tokens in examples["test"].sequences]
    lines = [
        "# ListOps",
        "",
        *describe_machine(command),
        "",
        f"Nested lists of {given.shortest} to {given.longest} tokens ({statistics.fmean(lengths):.0f} in the mean), "
        "generated with the rules of the Long Range",
        f"Arena: {len(examples['train']):,} to train on and {len(examples['test']):,} to test. A reversible encoder "
        f"of {DEPTH} blocks, width {DIM} and {NUM_HEADS} heads, with a linear layer",
        f"on the first token; blocks of {BLOCK_SIZE} tokens in hierarchical attention. {given.updates:,} updates of "
        f"{given.batch_size} sequences by AdamW,",
        f"rate {given.rate:g}, seeds {', '.join(map(str, given.seeds))}; {minutes:.0f} minutes of one processor "
        "for all.",
        "",
        *table(("", "accuracy by seed", "mean", f"loss of the last {LOG_EVERY} updates", "seconds an update"), cells),
        "",
        *DIFFERENCES,
        "",
        f"## A step on {given.long:,} tokens",
        "",
        "The same networks on one sequence: activations at the predicted peak, and the processor time of one step. No",
        "network was trained at this length.",
        "",
        *table(
            ("", "activations, MiB", "seconds"),
            [
                [f"{name} attention", mib(row["activation_bytes"]), f"{row['seconds']:.1f}"]
                for name, row in long.items()
            ],
        ),
    ]
    return "\n".join(lines).rstrip() + "\n"


DIFFERENCES = [
    "Published, at 500 to 2,000 tokens, with larger networks and many more updates: 36.4 % for the Transformer (Tay et",
    "al. 2021), 49.5 % for H-Transformer-1D (Zhu and Soricut 2021). These numbers are for other lengths and other",
    "budgets, so only the order of rows can be compared.",
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is missing, and write the page and its CSVs."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shortest", type=int, default=128, help="fewest tokens of a sequence")
    parser.add_argument("--longest", type=int, default=512, help="most tokens of a sequence")
    parser.add_argument(
        "--examples", type=int, default=6000, help="sequences to train on; a sixth of this number is tested"
    )
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rate", type=float, default=2e-3, help="largest learning rate")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--long", type=int, default=LONG, help="tokens of the step for memory and time")
    parser.add_argument("--runs", type=Path, help="folder of finished and unfinished trainings")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if not 4 <= given.shortest <= given.longest <= LONG:
        parser.error(f"--shortest must be at least 4 and at most --longest, which must be at most {LONG:,}")
    if min(given.examples // 6, given.updates // LOG_EVERY, given.batch_size, given.long) < 1 or min(given.seeds) < 0:
        parser.error(
            f"--examples must be at least 6, --updates at least {LOG_EVERY}, --batch-size and --long positive, and "
            "--seeds not negative"
        )
    pieces = Pieces(given.runs)
    lengths = (given.shortest, given.longest)
    examples = {
        "train": load_examples(given.runs, lengths, given.examples, seed=0),
        "test": load_examples(given.runs, lengths, given.examples // 6, seed=1),
    }
    results = {}
    for seed in given.seeds:
        for attention in ATTENTIONS:
            settings: dict[str, Any] = {"attention": attention, "seed": seed, "lengths": list(lengths)}
            settings |= {"examples": given.examples, "updates": given.updates}
            settings |= {"batch": given.batch_size, "rate": given.rate}
            name = f"listops_{attention}_{seed}"
            results[attention, seed] = pieces.get(
                name, settings, lambda name=name, settings=settings: train(name, given, settings, pieces, examples)
            )
    long = {
        attention: pieces.get(
            f"listops_long_{attention}",
            {"long": given.long},
            lambda attention=attention: long_step(attention, given.long),
        )
        for attention in ATTENTIONS
    }
    text = page(results, long, examples, given, shlex.join(["python", "benchmarks/listops.py", *arguments]))
    stem = f"listops_{hardware_name()}_{datetime.date.today()}"
    rows: list[Row] = [
        {"attention": attention, "seed": seed, "accuracy": result["accuracy"], "seconds": result["seconds"]}
        for (attention, seed), result in results.items()
    ]
    write_csv(rows, given.out_dir / f"{stem}.csv")
    curves = [
        {"attention": attention, "seed": seed, "update": update, "loss": loss}
        for (attention, seed), result in results.items()
        for update, loss in result["losses"]
    ]
    write_csv(curves, given.out_dir / f"{stem}_curves.csv")
    (given.out_dir / f"{stem}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
