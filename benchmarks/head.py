"""Compare the loss of a language model on whole logits with the same loss in chunks.

    python benchmarks/head.py

Writes head_<hardware>_<date>.md and a CSV for each of its tables to benchmarks/results/.
"""

import argparse
import datetime
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _memory_page import Row, Section, mib, table, write_csv
from torch import Tensor, nn

from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.functional import linear_cross_entropy
from revnet.functional._linear_cross_entropy import default_chunk_size
from revnet.memory import measure, predict
from revnet.models import ReversibleTransformer

RESULTS = Path(__file__).parent / "results"
NUM_HEADS = 4
OWN = ("whole", "chunked")
"""Ways that follow autocast, of which whole steps are compared."""
PRECISIONS = ("float32", "bf16 autocast")
PARTS_OF_REFERENCE = 16
"""Parts of the rows on which the float64 reference is computed."""

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Function of features, weight, bias and targets."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all parts and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=50_257, help="number of tokens to choose from")
    parser.add_argument("--batch", type=int, default=8, help="sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--features", type=int, default=256, help="features that the head reads")
    parser.add_argument("--depth", type=int, default=4, help="blocks of the language model")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each kind")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if min(given.vocabulary, given.batch, given.length, given.depth, given.rounds) < 1:
        parser.error("all numbers must be at least 1")
    if given.features < 1 or given.features % (4 * NUM_HEADS):
        parser.error(f"--features must be a multiple of {4 * NUM_HEADS}")
    if not given.out_dir.is_dir():
        parser.error(f"--out-dir {given.out_dir} is not a folder; create it first")
    sections = {"memory": bytes_of_steps(given), "gradients": errors(given), "time": times(given)}
    stem = f"head_{hardware_name()}_{datetime.date.today()}"
    num_tokens = given.batch * given.length
    page = [
        "# Head: the loss of a language model without whole logits",
        "",
        *describe_machine(shlex.join(["python", "benchmarks/head.py", *arguments])),
        "",
        f"A vocabulary of {given.vocabulary:,}, {num_tokens:,} tokens ({given.batch} sequences of {given.length}) and",
        f"{given.features} features: the logits have {num_tokens * given.vocabulary:,} numbers, "
        f"{num_tokens * given.vocabulary * 4 / 2**20:,.0f} MiB in float32.",
        "*Whole* is `cross_entropy` on the output of a linear layer. *Chunked* is",
        f"`revnet.functional.linear_cross_entropy`, here with {chunk_rows(given)} rows at a time. *PyTorch* is",
        "`torch.nn.functional.linear_cross_entropy` with `LinearCrossEntropyOptions()`, once with its own chunks and",
        f"once with {chunk_rows(given)} rows.",
        "",
        *(line for section in sections.values() for line in section.lines),
    ]
    for name, section in sections.items():
        write_csv(section.rows, given.out_dir / f"{stem}_{name}.csv")
    text = "\n".join(page).rstrip() + "\n"
    (given.out_dir / f"{stem}.md").write_text(text)
    print(text)


def chunk_rows(given: argparse.Namespace) -> int:
    """Return the rows of a chunk."""
    return default_chunk_size(given.batch * given.length, given.vocabulary, given.features)


def losses(given: argparse.Namespace) -> dict[str, Loss]:
    """Return the ways to compute the loss; the ones of PyTorch only if it has them."""

    def whole(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(x, weight, bias)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)

    def chunked(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, targets, bias=bias)

    ways: dict[str, Loss] = {"whole": whole, "chunked": chunked}
    if hasattr(nn, "LinearCrossEntropyOptions"):
        for name, rows in (("PyTorch", None), (f"PyTorch, {chunk_rows(given)} rows", chunk_rows(given))):
            options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

            def by_pytorch(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, options=options) -> Tensor:  # type: ignore[no-untyped-def]
                return F.linear_cross_entropy(x, weight, targets, linear_bias=bias, options=options)

            ways[name] = by_pytorch
    return ways


class LanguageLoss(nn.Module):
    """A language model with its loss, as one module."""

    def __init__(self, model: ReversibleTransformer, loss: Loss):
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the loss, with the tokens as their own targets."""
        x = self.model.forward_features(tokens).flatten(0, 1)
        return self.loss(x, self.model.head.weight, self.model.head.bias, tokens.flatten())


def make_model(given: argparse.Namespace) -> ReversibleTransformer:
    """Return the language model."""
    torch.manual_seed(0)
    return ReversibleTransformer(
        vocab_size=given.vocabulary,
        dim=given.features // 2,
        depth=given.depth,
        num_heads=NUM_HEADS,
        max_length=given.length,
    )


def make_head(given: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features, weight, bias and targets."""
    torch.manual_seed(0)
    x = torch.randn(given.batch * given.length, given.features)
    weight = torch.randn(given.vocabulary, given.features) / given.features**0.5
    targets = torch.randint(given.vocabulary, (len(x),))
    return x.requires_grad_(), weight.requires_grad_(), torch.zeros(given.vocabulary, requires_grad=True), targets


# Memory ---------------------------------------------------------------------------------------------------------------


def bytes_of_steps(given: argparse.Namespace) -> Section:
    """Predict and count the bytes of training steps."""
    tokens = torch.randint(given.vocabulary, (given.batch, given.length))
    rows: list[Row] = []
    for name, loss in losses(given).items():
        optimizers: dict[str, dict[str, Any]] = {
            "none": {},
            "AdamW": {"optimizer": torch.optim.AdamW},
            "AdamW in the backward pass": {"optimizer": torch.optim.AdamW, "step_in_backward": True},
        }
        if name not in OWN:
            optimizers = {"none": {}}
        for words, options in optimizers.items():
            model = LanguageLoss(make_model(given), loss)
            predicted, counted = predict(model, tokens, **options), measure(model, tokens, **options)
            rows.append(
                {
                    "loss": name,
                    "optimizer": words,
                    "predicted_bytes": predicted.peak_bytes,
                    "counted_bytes": counted.peak_bytes,
                    "activation_bytes": counted.activation_bytes,
                }
            )
    cells = []
    for row in rows:
        peaks = [f"{row[key]:,}" for key in ("predicted_bytes", "counted_bytes")]
        cells.append([row["loss"], row["optimizer"], *peaks, mib(row["counted_bytes"]), mib(row["activation_bytes"])])
    header = ("loss", "optimizer", "predicted bytes", "counted bytes", "counted, MiB", "activations alone, MiB")
    return Section(
        [
            "## Memory",
            "",
            f"Peak of a training step of a `ReversibleTransformer` with {given.depth} reversed blocks, by `predict`",
            "and by `measure`. Everything counts: parameters, gradients, state of the optimizer, activations.",
            "",
            *table(header, cells),
            "",
        ],
        rows,
    )


# Gradients ------------------------------------------------------------------------------------------------------------


def errors(given: argparse.Namespace) -> Section:
    """Compare gradients with float64, and second derivatives with whole logits."""
    *inputs, targets = make_head(given)
    exact = exact_gradients(inputs, targets)
    rows: list[Row] = []
    for name, loss in losses(given).items():
        # The loss of PyTorch computes in float32 under autocast, too.
        for precision in PRECISIONS if name in OWN else PRECISIONS[:1]:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
                value = loss(*inputs, targets)
            row: Row = {"loss": name, "precision": precision}
            for key, gradient, right in zip(
                ("features", "weight", "bias"), torch.autograd.grad(value, inputs), exact, strict=True
            ):
                row[f"error_{key}"] = error(gradient, right)
            row["error_second"] = second_error(loss) if precision == "float32" else ""
            rows.append(row)
    cells = []
    for row in rows:
        first = [f"{row[f'error_{key}']:.1e}" for key in ("features", "weight", "bias")]
        second = f"{row['error_second']:.1e}" if row["error_second"] != "" else ""
        cells.append([row["loss"], row["precision"], *first, second])
    header = ("loss", "precision", "gradient of the features", "of the weight", "of the bias", "second derivative")
    return Section(
        [
            "## Gradients",
            "",
            "Relative errors of gradients to those in float64. The last column is about a gradient penalty on a small",
            "network in float64, compared with whole logits: the gradient of the squared norm of a gradient.",
            "The loss of PyTorch computes in float32 under autocast, too.",
            "",
            *table(header, cells),
            "",
        ],
        rows,
    )


def exact_gradients(inputs: Sequence[Tensor], targets: Tensor) -> list[Tensor]:
    """Return the gradients in float64, by autograd on some rows after the others."""
    x, weight, bias = (tensor.detach().double().requires_grad_() for tensor in inputs)
    for rows, labels in zip(x.chunk(PARTS_OF_REFERENCE), targets.chunk(PARTS_OF_REFERENCE), strict=True):
        (F.cross_entropy(F.linear(rows, weight, bias), labels, reduction="sum") / len(x)).backward()
    return [tensor.grad for tensor in (x, weight, bias) if tensor.grad is not None]


def second_error(loss: Loss) -> float:
    """Return the error of a second derivative through a layer before the head."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x, first, weight, bias = random(12, 8), random(8, 8), random(40, 8), random(40)
    targets = torch.randint(40, (12,), generator=generator)

    def penalty_gradient(loss: Loss) -> Tensor:
        (gradient,) = torch.autograd.grad(loss((x @ first).tanh(), weight, bias, targets), first, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), first)[0]

    def whole(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight, bias), targets)

    return error(penalty_gradient(loss), penalty_gradient(whole))


def error(value: Tensor, right: Tensor) -> float:
    """Return the relative error in the Euclidean norm."""
    return float((value.double() - right.double()).norm() / right.double().norm())


# Time -----------------------------------------------------------------------------------------------------------------


def times(given: argparse.Namespace) -> Section:
    """Time the head alone and whole steps, interleaved."""
    *inputs, targets = make_head(given)
    tokens = torch.randint(given.vocabulary, (given.batch, given.length))
    models = {name: LanguageLoss(make_model(given), losses(given)[name]) for name in OWN}
    rows: list[Row] = []
    for precision in PRECISIONS:
        head = {
            name: partial(step_of_head, loss, inputs, targets, precision)
            for name, loss in losses(given).items()
            if name in OWN or precision == "float32"
        }
        model = {name: partial(step_of_model, module, tokens, precision) for name, module in models.items()}
        head_seconds, model_seconds = interleaved(head, given.rounds), interleaved(model, given.rounds)
        rows += [
            {
                "loss": name,
                "precision": precision,
                "head_ratio": head_seconds[name] / head_seconds["whole"],
                "step_ratio": model_seconds[name] / model_seconds["whole"] if name in OWN else "",
                "head_seconds": head_seconds[name],
                "step_seconds": model_seconds.get(name, ""),
            }
            for name in head
        ]
    cells = []
    for row in rows:
        step = f"{row['step_ratio']:.2f}" if row["step_ratio"] != "" else ""
        cells.append([row["loss"], row["precision"], f"{row['head_ratio']:.2f}", step])
    return Section(
        [
            "## Time",
            "",
            f"Processor time, forward and backward, as a ratio to whole logits: medians of {given.rounds} rounds, in",
            "which the ways take turns.",
            "",
            *table(("loss", "precision", "loss alone", "step of the language model"), cells),
        ],
        rows,
    )


def interleaved(steps: dict[str, Callable[[], None]], num_rounds: int) -> dict[str, float]:
    """Return the median processor time of each step."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(num_rounds):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def step_of_head(loss: Loss, inputs: Sequence[Tensor], targets: Tensor, precision: str) -> None:
    """Compute the loss of the head and its gradients."""
    for tensor in inputs:
        tensor.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
        value = loss(*inputs, targets)
    value.backward()


def step_of_model(model: LanguageLoss, tokens: Tensor, precision: str) -> None:
    """Compute the loss of the language model and its gradients."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision != "float32"):
        value = model(tokens)
    value.backward()


if __name__ == "__main__":
    main()
