"""Forms of a deep language model at the same budget: coupled, midpoint, leapfrog and stored.

    python benchmarks/forms.py --data tinyshakespeare/input.txt

Trains a transformer of characters of 20 layers in each form, in floating point and on a fixed-point grid, and one of
them under bf16 autocast. The forms start from the same weights and read the same windows. Reports the validation loss,
the peak of an update, processor time, and the drift every 100 updates; then lets each form continue a text by 500
characters with and without a cache of keys and values.

Each model is one piece of work: its state is kept in --work-dir every 50 updates and its figures at the end, so a run
that was stopped continues, and finished pieces are not trained again. --only selects pieces, and --report writes the
page from the finished ones. At the default sizes, a piece takes about four minutes of one core. Writes a page and
its CSVs to benchmarks/results/.
"""

import argparse
import datetime
import math
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _memory_page import Row, Section, mib, table, write_csv
from _pieces import Pieces
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from revnet import FixedPoint
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.memory import measure
from revnet.models import ReversibleTransformer
from revnet.numerics import measure_drift

RESULTS = Path(__file__).parent / "results"
SAVE_EVERY, REPORT_EVERY = 50, 100
VALIDATION_WINDOWS, PROMPT, GENERATED = 100, 20, 500


@dataclass(frozen=True)
class Variant:
    """A piece of work: a form, its arithmetic and its precision."""

    form: str
    is_exact: bool = False
    autocast: bool = False

    @property
    def name(self) -> str:
        """Name of the piece, and of its files."""
        return self.form + ("_exact" if self.is_exact else "") + ("_bf16" if self.autocast else "")

    @property
    def dtype(self) -> torch.dtype | None:
        """Data type of autocast; None for float32."""
        return torch.bfloat16 if self.autocast else None


VARIANTS = (
    Variant("stored"),
    Variant("coupled"),
    Variant("midpoint"),
    Variant("leapfrog"),
    Variant("coupled", is_exact=True),
    Variant("midpoint", is_exact=True),
    Variant("leapfrog", is_exact=True),
    Variant("midpoint", autocast=True),
)


@dataclass(frozen=True)
class Sizes:
    """The sizes that all pieces share. Pieces of other sizes are trained again."""

    depth: int
    dim: int
    length: int
    batch_size: int
    num_updates: int
    lr: float
    seed: int


class Text:
    """Characters as numbers. The last tenth is for validation."""

    def __init__(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        self.characters = sorted(set(text))
        numbers = {character: number for number, character in enumerate(self.characters)}
        tokens = torch.tensor([numbers[character] for character in text])
        self.train, self.validation = tokens[: int(0.9 * len(tokens))], tokens[int(0.9 * len(tokens)) :]

    def batch(self, sizes: Sizes, update: int) -> tuple[Tensor, Tensor]:
        """Return the windows of an update, and the characters that follow."""
        generator = torch.Generator().manual_seed(1000 * sizes.seed + update)
        starts = torch.randint(len(self.train) - sizes.length, (sizes.batch_size,), generator=generator)
        return _windows(self.train, starts, sizes.length)

    def validation_batches(self, sizes: Sizes) -> list[tuple[Tensor, Tensor]]:
        """Return windows that are spread evenly over the validation text."""
        starts = torch.linspace(0, len(self.validation) - sizes.length - 1, VALIDATION_WINDOWS).long()
        return [_windows(self.validation, part, sizes.length) for part in starts.split(sizes.batch_size)]


def _windows(text: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    rows = text[starts[:, None] + torch.arange(length + 1)]
    return rows[:, :-1], rows[:, 1:]


def make_model(variant: Variant, sizes: Sizes, vocab_size: int) -> ReversibleTransformer:
    """Return a new model. All forms have the same weights in their layers."""
    torch.manual_seed(sizes.seed)
    return ReversibleTransformer(
        vocab_size=vocab_size,
        dim=sizes.dim,
        depth=sizes.depth,
        num_heads=4,
        max_length=max(GENERATED + PROMPT, sizes.length),
        form=variant.form,
        norm="rms",
        mlp="swiglu",
        ff_mult=8 / 3,
        bias=False,
        coupling=FixedPoint() if variant.is_exact else None,
    )


def train(variant: Variant, sizes: Sizes, text: Text, pieces: Pieces) -> dict[str, Any]:
    """Train a piece from its last state on, and return its figures."""
    model = make_model(variant, sizes, len(text.characters))
    optimizer = torch.optim.AdamW(model.parameters(), lr=sizes.lr, betas=(0.9, 0.99), weight_decay=0.1)
    notes = pieces.load(variant.name, asdict(sizes), model, optimizer)
    first, figures = notes.get("update", 0), notes.get("figures", {"rows": [], "seconds": []})
    for update in range(first, sizes.num_updates + 1):
        if update % SAVE_EVERY == 0 and update > first:
            pieces.save(variant.name, asdict(sizes), model, optimizer, {"update": update, "figures": figures})
        if update % REPORT_EVERY == 0 or update == sizes.num_updates:
            figures["rows"].append(_row(variant, sizes, text, model, update))
            print(variant.name, figures["rows"][-1], file=sys.stderr, flush=True)
        if update < sizes.num_updates:
            start = time.process_time()
            _update(variant, sizes, text, model, optimizer, update)
            figures["seconds"].append(time.process_time() - start)
    tokens, targets = text.batch(sizes, 0)
    step = measure(model, tokens, kwargs={"targets": targets}, loss=_itself, autocast=variant.dtype)
    figures |= {"peak_bytes": step.activation_bytes, "generation": _generate(model, text)}
    figures["num_parameters"] = sum(parameter.numel() for parameter in model.parameters())
    return figures


def _update(variant: Variant, sizes: Sizes, text: Text, model: Any, optimizer: Any, update: int) -> None:
    warm = max(1, sizes.num_updates // 20)
    decay = 0.5 * (1 + math.cos(math.pi * update / sizes.num_updates))
    optimizer.param_groups[0]["lr"] = sizes.lr * min(1.0, (update + 1) / warm) * decay
    tokens, targets = text.batch(sizes, update)
    with torch.autocast("cpu", torch.bfloat16, enabled=variant.autocast):
        loss = model(tokens, targets=targets)
    optimizer.zero_grad()
    loss.backward()
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _row(variant: Variant, sizes: Sizes, text: Text, model: Any, update: int) -> Row:
    """Return the validation loss and the drift after a number of updates."""
    row: Row = {"piece": variant.name, "update": update}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=variant.autocast):
        batches = text.validation_batches(sizes)
        total = sum(float(model(tokens, targets=targets)) * len(tokens) for tokens, targets in batches)
    row["val_loss"] = total / VALIDATION_WINDOWS
    row |= dict.fromkeys(("drift", "gradient_error", "gradient_angle_degrees"))
    if variant.form != "stored":
        tokens, targets = text.batch(sizes, update)
        options = {"loss": _itself, "gradients": True, "autocast": variant.dtype}
        drift = measure_drift(model, tokens, kwargs={"targets": targets}, **options)
        assert drift.gradient is not None
        row["drift"], row["gradient_error"] = drift.error, drift.gradient.relative_error
        row["gradient_angle_degrees"] = drift.gradient.angle_degrees
    return row


def _itself(loss: Tensor) -> Tensor:
    return loss


def _generate(model: ReversibleTransformer, text: Text) -> dict[str, Any]:
    """Continue a text with and without a cache, and return processor seconds and whether the tokens are equal."""
    prompt = text.validation[None, :PROMPT]
    seconds: dict[str, float] = {}
    outputs = []
    for use_cache in (True, False):
        for num_new in (GENERATED // 4, GENERATED // 2, GENERATED):
            start = time.process_time()
            tokens = model.generate(prompt, num_new, temperature=0, use_cache=use_cache)
            seconds[f"{'cache' if use_cache else 'plain'}_{num_new}"] = time.process_time() - start
        outputs.append(tokens)
    return {"seconds": seconds, "is_equal": torch.equal(*outputs)}


# The page -------------------------------------------------------------------------------------------------------------


def page_of(sizes: Sizes, done: dict[Variant, dict[str, Any]]) -> tuple[Section, Section]:
    """Return the section of results, and the section of drift."""
    rows = []
    for variant, figures in done.items():
        last, generation = figures["rows"][-1], figures["generation"]
        rows.append(
            {
                "form": variant.form,
                "arithmetic": "exact" if variant.is_exact else "float",
                "precision": "bf16" if variant.autocast else "float32",
                "num_parameters": figures["num_parameters"],
                "val_loss": last["val_loss"],
                "peak_bytes": figures["peak_bytes"],
                "update_seconds": statistics.median(figures["seconds"]),
                "drift": last["drift"],
                "gradient_error": last["gradient_error"],
                "gradient_angle_degrees": last["gradient_angle_degrees"],
                "is_generation_equal": generation["is_equal"],
                **{f"generate_{name}_seconds": value for name, value in generation["seconds"].items()},
            }
        )
    return _results(sizes, rows), _drifts(done)


def _results(sizes: Sizes, rows: list[Row]) -> Section:
    columns = ("form", "arithmetic", "precision", "loss", "peak, MiB", "s per update", "drift", "gradient error")
    cells = [
        [
            row["form"],
            row["arithmetic"],
            row["precision"],
            f"{row['val_loss']:.3f}",
            mib(row["peak_bytes"]),
            f"{row['update_seconds']:.2f}",
            _small(row["drift"]),
            _small(row["gradient_error"]),
        ]
        for row in rows
    ]
    lengths = (GENERATED // 4, GENERATED // 2, GENERATED)
    ways = [f"{way}_{length}" for way in ("cache", "plain") for length in lengths]
    generated = [
        [
            f"{row['form']}, {row['arithmetic']}, {row['precision']}",
            "yes" if row["is_generation_equal"] else "no",
            *[f"{row[f'generate_{way}_seconds']:.2f}" for way in ways],
        ]
        for row in rows
    ]
    lines = [
        f"Transformers of {sizes.depth} layers, width {sizes.dim}, 4 heads, RMSNorm, SwiGLU and no biases, after",
        f"{sizes.num_updates:,} updates of {sizes.batch_size} windows of {sizes.length} characters, AdamW, learning",
        f"rate {sizes.lr:g} with a cosine. All forms start from the same layers and read the same windows. *Loss*:",
        f"nats per character on {VALIDATION_WINDOWS} windows of the last tenth of the text. *Peak*: counted activation",
        "bytes of an update. *Seconds*: processor time, median. *Drift*: largest relative error of a rebuilt stream",
        "after the last update; *gradient error*: of all gradients, next to the same weights with all activations",
        "stored. The coupled form has two streams of this width, and a head on both.",
        "",
        *table(columns, cells),
        f"Greedy continuation of {PROMPT} characters: processor seconds of {lengths[0]}, {lengths[1]} and {lengths[2]}",
        "new ones, with the cache and without it. *Equal*: the tokens are the same.",
        "",
        *table(("model", "equal", *[way.replace("_", ", ") for way in ways]), generated),
    ]
    return Section(lines, rows)


def _drifts(done: dict[Variant, dict[str, Any]]) -> Section:
    rows = [row for figures in done.values() for row in figures["rows"]]
    updates = sorted({row["update"] for row in rows})
    lines = ["Validation loss / drift of the streams / error of the gradients, by number of updates:", ""]
    cells = []
    for variant, figures in done.items():
        by_update = {row["update"]: row for row in figures["rows"]}
        texts = [
            f"{by_update[update]['val_loss']:.3f} / {_small(by_update[update]['drift'])} / "
            f"{_small(by_update[update]['gradient_error'])}"
            for update in updates
        ]
        cells.append([variant.name.replace("_", ", "), *texts])
    return Section([*lines, *table(("model", *map(str, updates)), cells)], rows)


def _small(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}" if value else "0"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the pieces that are missing, and write the page and its CSVs."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--data", type=Path, required=True, help="text file")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="pieces to train")
    parser.add_argument("--report", action="store_true", help="train nothing, and write the page")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--num-updates", type=int, default=400)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work-dir", type=Path, default=Path("runs/forms"), help="folder of unfinished pieces")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    sizes = Sizes(given.depth, given.dim, given.length, given.batch_size, given.num_updates, given.lr, given.seed)
    if min(sizes.depth, sizes.dim, sizes.length, sizes.batch_size, sizes.num_updates) < 1:
        parser.error("sizes must be positive")
    text, pieces, settings = Text(given.data), Pieces(given.work_dir), asdict(sizes)
    done = {}
    for variant in VARIANTS:
        known = pieces.stored(variant.name, settings)
        if known is None and not given.report and variant.name in given.only:
            known = pieces.get(variant.name, settings, partial(train, variant, sizes, text, pieces))
        if known is not None:
            done[variant] = known
    if not done:
        parser.error("no piece is finished; leave out --report")
    stem = f"forms_{hardware_name()}_{datetime.date.today()}"
    command = shlex.join(["python", "benchmarks/forms.py", *arguments])
    results, drifts = page_of(sizes, done)
    write_csv(results.rows, given.out_dir / f"{stem}.csv")
    write_csv(drifts.rows, given.out_dir / f"{stem}_drift.csv")
    page = "\n".join(["# Forms of a language model", "", *describe_machine(command), "", *results.lines, *drifts.lines])
    (given.out_dir / f"{stem}.md").write_text(page.rstrip() + "\n")
    print(page)


if __name__ == "__main__":
    main()
