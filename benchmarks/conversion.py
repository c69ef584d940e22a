"""Convert models of timm and transformers in place, and compare bytes, outputs and gradients with the original.

    python benchmarks/conversion.py

Needs timm and transformers; models are built without weights. Two models are drawn at random from timm's list. Writes
conversion_<hardware>_<date>.md and a CSV to benchmarks/results/.
"""

import argparse
import copy
import datetime
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from _memory_page import Row, mib, table, write_csv
from torch import Tensor, nn

import revnet
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.conversion import BDIA, AbstractMethod, Consistent, Dr2Net, Rewire
from revnet.memory import measure, predict

RESULTS = Path(__file__).parent / "results"
SEED = 21
DRAWN = {"fasternet_m": [f"stages.{stage}.blocks" for stage in range(4)], "resnetblur50": None}
"""The first two models that `SEED` draws, with the names of their lists of blocks."""
LAYERS = [f"layer{stage}" for stage in range(1, 5)]
METHODS: Mapping[str, AbstractMethod] = {
    "Dr2Net(1, 0)": Dr2Net(),
    "Rewire()": Rewire(),
    "Consistent(0.25)": Consistent(0.25, 11),
    "BDIA(0.25)": BDIA(0.25, 11),
}

FIGURES = ("converted", "left", "equals_original", "distance", "distance_evaluated", "equals_twin", "gradient_error")
"""Columns of the CSV that only converted models have."""


@dataclass(frozen=True)
class Case:
    """A model with the arguments of its step."""

    name: str
    model: nn.Module
    blocks: Sequence[str] | str
    """Names of its lists of blocks."""
    checkpointing: Callable[[nn.Module], Any]
    """Turns on the checkpointing of the library."""
    inputs: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cases and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=2, help="samples")
    parser.add_argument("--image", type=int, default=32, help="side of the images")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    rows = []
    for case in cases(given):
        own = rows_of(case)
        print(f"{case.name}: {len(own)} rows", file=sys.stderr, flush=True)
        rows += own
    write(given.out_dir, shlex.join(["python", "benchmarks/conversion.py", *arguments]), rows, given)


def cases(given: argparse.Namespace) -> Iterator[Case]:
    """Yield the models."""
    for name in ("resnet50", "resnet101"):
        yield image_case(name, LAYERS, given, zero_init_last=False)
    for depth in (12, 24):
        yield image_case("vit_tiny_patch16_224", "blocks", given, depth=depth, img_size=given.image, patch_size=4)
    for depth in (6, 12):
        yield gpt2_case(depth, given)
        yield llama_case(depth, given)
    for name, blocks in DRAWN.items():
        yield image_case(name, blocks or LAYERS, given)


def image_case(name: str, blocks: Sequence[str] | str, given: argparse.Namespace, **options: Any) -> Case:
    """Return a case for a classifier of timm, without weights."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, **options)
    images = torch.randn(given.batch, 3, given.image, given.image)
    label = f"{name}, depth {options['depth']}" if "depth" in options else name
    return Case(label, model, blocks, lambda model: model.set_grad_checkpointing(), (images,))


def gpt2_case(depth: int, given: argparse.Namespace) -> Case:
    """Return a case for GPT-2 of transformers, without weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=depth, n_embd=128, n_head=4, vocab_size=256, n_positions=given.length, bos_token_id=0, eos_token_id=0
    )
    return language_case(f"GPT-2, depth {depth}", GPT2LMHeadModel(config), "transformer.h", given)


def llama_case(depth: int, given: argparse.Namespace) -> Case:
    """Return a case for a small LLaMA of transformers, without weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=depth, hidden_size=128, intermediate_size=344, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return language_case(f"LLaMA, depth {depth}", LlamaForCausalLM(config), "model.layers", given)


def language_case(name: str, model: nn.Module, blocks: str, given: argparse.Namespace) -> Case:
    """Return a case for a language model."""
    tokens = torch.randint(256, (given.batch, given.length))
    kwargs = {"input_ids": tokens, "labels": tokens, "use_cache": False}
    return Case(name, model, blocks, lambda model: model.gradient_checkpointing_enable(), (), kwargs)


def rows_of(case: Case) -> list[Row]:
    """Measure one model in all ways."""
    own = copy.deepcopy(case.model)
    case.checkpointing(own)
    evaluated = evaluate(case, case.model)
    original, original_grads = step(case, copy.deepcopy(case.model))
    rows = [
        row(case, "original", case.model),
        row(case, "its own checkpointing", own),
    ]
    for name, method in METHODS.items():
        model = copy.deepcopy(case.model)
        report = revnet.convert(model, method, blocks=case.blocks)
        stored = copy.deepcopy(model)
        revnet.set_policy(stored, "store")
        # Before the step, which updates statistics of batch norms.
        in_evaluation = evaluate(case, model)
        output, grads = step(case, model)
        twin, twin_grads = step(case, stored)
        figures = {
            "converted": len(report.converted),
            "left": len(report.left),
            "equals_original": int(torch.equal(output, original) and distance(grads, original_grads) == 0),
            "distance": float((output - original).norm() / original.norm()),
            "distance_evaluated": float((in_evaluation - evaluated).norm() / evaluated.norm()),
            "equals_twin": int(torch.equal(output, twin) and distance(grads, twin_grads) == 0),
            "gradient_error": distance(grads, twin_grads),
        }
        rows.append(row(case, name, model) | figures)
    return rows


def row(case: Case, way: str, model: nn.Module) -> Row:
    """Return the bytes of a step."""
    model.train()
    measured = measure(model, *case.inputs, kwargs=dict(case.kwargs), loss=loss_of)
    predicted = predict(model, *case.inputs, kwargs=dict(case.kwargs), loss=loss_of)
    figures = {"activation_bytes": measured.activation_bytes, "predicted_bytes": predicted.activation_bytes}
    return {"model": case.name, "way": way, **figures, **dict.fromkeys(FIGURES, "")}


def loss_of(output: Any) -> Tensor:
    """Return the loss of a step."""
    return output.square().mean() if isinstance(output, Tensor) else output.loss


def step(case: Case, model: nn.Module) -> tuple[Tensor, list[Tensor | None]]:
    """Return the output and all gradients of a step in training mode, which always draws the same numbers."""
    model.train()
    model.zero_grad()
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", revnet.ReconstructionWarning)
        output = model(*case.inputs, **case.kwargs)
        loss_of(output).backward()
    tensor = output if isinstance(output, Tensor) else output.logits
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    return tensor.detach(), grads


def evaluate(case: Case, model: nn.Module) -> Tensor:
    """Return the output in evaluation mode."""
    model.eval()
    with torch.no_grad():
        output = model(*case.inputs, **case.kwargs)
    return output if isinstance(output, Tensor) else output.logits


def distance(grads: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> float:
    """Return the relative distance of all gradients."""
    pairs = [(a.double(), b.double()) for a, b in zip(grads, others, strict=True) if a is not None and b is not None]
    norm = sum(float(b.square().sum()) for _, b in pairs) ** 0.5
    return sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5 / norm


def write(folder: Path, command: str, rows: Sequence[Row], given: argparse.Namespace) -> None:
    """Write the page and its CSV."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = folder / f"conversion_{hardware_name()}_{date}"
    write_csv(rows, path.with_suffix(".csv"))
    libraries = ", ".join(f"{name} {version(name)}" for name in ("timm", "transformers"))
    lines = ["# Converted models", "", *describe_machine(command), f"- Libraries: {libraries}", ""]
    lines += [
        f"Batches of {given.batch} images of {given.image}x{given.image} pixels, or of {given.batch} sequences of "
        f"{given.length} tokens; random weights, float32. The last two models were drawn at random from timm's list.",
        "",
        "*MiB* are the activations of a training step, counted by `measure`. *Predicted* are the ones of "
        "`predict`. *From the original* is the relative distance of the outputs: in training mode, and in evaluation "
        "mode. "
        "*Gradients* are compared with the stored twin's, the same converted network under plain autograd. Exact "
        "methods have 11 bits of fraction.",
        "",
    ]
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        counts = next(row for row in own if row["converted"] != "")
        total = counts["converted"] + counts["left"]
        lines += [f"## {name}", "", f"{counts['converted']} of {total} blocks are converted.", ""]
        columns = ["way", "MiB", "predicted", "from the original", "evaluated", "gradients"]
        lines += table(columns, [cells_of(row) for row in own])
    path.with_suffix(".md").write_text("\n".join(lines))
    print("\n".join(lines))


def cells_of(row: Row) -> list[str]:
    """Return the cells of a row of the page."""
    predicted = "equal" if row["predicted_bytes"] == row["activation_bytes"] else mib(row["predicted_bytes"])
    cells = [row["way"], mib(row["activation_bytes"]), predicted]
    if row["converted"] == "":
        return [*cells, "", "", ""]
    original = "bit-equal" if row["equals_original"] else f"{row['distance']:.1g}"
    twin = "bit-equal" if row["equals_twin"] else f"{row['gradient_error']:.1g}"
    return [*cells, original, f"{row['distance_evaluated']:.1g}", twin]


if __name__ == "__main__":
    main()
