"""Fit models of timm and transformers into memory budgets, and compare with their own checkpointing.

    python benchmarks/any_model.py

Needs timm and transformers; models are built without weights. Two of them are drawn at random, from the models of timm
and from the language models of transformers. Writes any-model_<hardware>_<date>.md and a CSV to benchmarks/results/.
"""

import argparse
import copy
import datetime
import gc
import random
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _memory_page import Row, mib, table, write_csv
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from revnet import PredictionError, apply_budget
from revnet._hardware import hardware_name
from revnet._provenance import describe_machine
from revnet.memory import StepMemory, measure, predict

RESULTS = Path(__file__).parent / "results"
OPTIMIZER = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
SHARES = (0.0, 0.33, 0.67)
"""Budgets between the least memory of any plan (0) and the peak of the unchanged model (1)."""
MOST_PARAMETERS = 30_000_000
"""Size above which a model that was drawn is left out."""
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), 6),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner"), 512),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 256),
    **{"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 1000},
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0),
}
"""Sizes of the language models, by the names that configurations give them."""


@dataclass(frozen=True)
class Case:
    """A model with the arguments of its step, and its own switch for checkpointing."""

    name: str
    model: nn.Module
    switch: str
    """Method that turns on the checkpointing of the library."""
    inputs: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    loss: Callable[[Any], Tensor] | None = None

    @property
    def step(self) -> dict[str, Any]:
        """The arguments of `predict` and `measure`."""
        return {"kwargs": self.kwargs, "loss": self.loss, "optimizer": OPTIMIZER}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all cases and write the results."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of the models that are drawn")
    parser.add_argument("--batch", type=int, default=8, help="samples")
    parser.add_argument("--image", type=int, default=224, help="side of the images")
    parser.add_argument("--length", type=int, default=128, help="tokens of a sequence")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--out-dir", type=Path, default=RESULTS)
    given = parser.parse_args(arguments)
    if min(given.batch, given.image, given.length, given.rounds) < 1:
        parser.error("all numbers must be at least 1")
    if not given.out_dir.is_dir():
        parser.error(f"--out-dir {given.out_dir} is not a folder; create it first")
    for name in ("timm", "transformers"):
        if find_spec(name) is None:
            parser.error(f"{name} is not installed; run `pip install {name}`")
    rows: list[Row] = []
    lines: list[str] = []
    for case in cases(given, lines):
        own = rows_of(case, given.rounds)
        print(f"{case.name}: {len(own)} rows", file=sys.stderr)
        rows += own
    write(given.out_dir, shlex.join(["python", "benchmarks/any_model.py", *arguments]), rows, lines, given)


# Models ---------------------------------------------------------------------------------------------------------------


def cases(given: argparse.Namespace, lines: list[str]) -> Iterator[Case]:
    """Yield the models; `lines` receives a line for each one that was drawn and left out."""
    yield image_case("vit_tiny_patch16_224", given)
    yield image_case("resnet18", given)
    yield language_case("gpt2", given)
    for names, make in ((image_names(), image_case), (language_names(), language_case)):
        for name in random.Random(given.seed).sample(names, len(names)):
            torch.manual_seed(0)
            try:
                case = make(name, given)
                reason = cannot_train(case)
            except Exception as error:
                reason = f"it cannot be built in this size ({type(error).__name__})"
            if not reason:
                yield case
                break
            lines.append(f"- {name}: {reason}")
            print(lines[-1], file=sys.stderr)


def cannot_train(case: Case) -> str:
    """Return why a model that was drawn is left out; empty if it is not."""
    if (count := num_parameters(case.model)) > MOST_PARAMETERS:
        return f"it has {count / 1e6:.0f} million parameters"
    if not hasattr(case.model, case.switch):
        return f"it has no `{case.switch}`"
    try:
        gradients(case.model, case)
        own = copy.deepcopy(case.model)
        getattr(own, case.switch)()
        gradients(own, case)
    except Exception as error:
        return f"it cannot be trained so ({type(error).__name__})"
    try:
        apply_budget(copy.deepcopy(case.model), *case.inputs, budget=2**62, **case.step)
    except (PredictionError, ValueError) as error:
        return f"it cannot be planned: {error}"
    return ""


def num_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def image_names() -> list[str]:
    """Return the names of timm's models."""
    import timm

    return sorted(timm.list_models())


def image_case(name: str, given: argparse.Namespace) -> Case:
    """Return a model of timm with images."""
    import timm

    torch.manual_seed(0)
    with torch.device("meta"):
        is_large = num_parameters(timm.create_model(name)) > MOST_PARAMETERS
    with torch.device("meta" if is_large else "cpu"):
        model = timm.create_model(name, pretrained=False, num_classes=100).train()
    images = torch.randn(given.batch, 3, given.image, given.image)
    return Case(f"timm {name}", model, "set_grad_checkpointing", inputs=(images,))


def language_names() -> list[str]:
    """Return the types of the language models of transformers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def language_case(name: str, given: argparse.Namespace) -> Case:
    """Return a small language model of transformers with padded sequences."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    default = AutoConfig.for_model(name)
    config = AutoConfig.for_model(name, **{key: size for key, size in SMALL.items() if hasattr(default, key)})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if num_parameters(model) <= MOST_PARAMETERS:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).train()
    tokens = torch.randint(1, 1000, (given.batch, given.length))
    # With padding, the model needs its attention mask whether or not it can look at the values.
    mask = torch.ones_like(tokens)
    mask[0, -1] = 0
    kwargs = {"input_ids": tokens, "attention_mask": mask, "labels": tokens, "use_cache": False}
    switches = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # The second is the older name.
    switch = next(name for name in switches if hasattr(model, name))
    return Case(f"transformers {name}", model, switch, kwargs=kwargs, loss=loss_of)


def loss_of(output: Any) -> Tensor:
    """Return the loss that a model of transformers computed."""
    return output.loss


# Measurements ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A model whose activations are handled in one way."""

    name: str
    model: nn.Module
    predicted: StepMemory
    budget_bytes: int | None = None
    policies: str = ""
    """Number of blocks under each policy."""


def rows_of(case: Case, num_rounds: int) -> list[Row]:
    """Return one row for each way of running the model."""
    ways = list(ways_of(case))
    expected = gradients(case.model, case)
    seconds = time_in_turns(ways, case, num_rounds)
    rows = []
    for way, own in zip(ways, seconds, strict=True):
        measured = measure(way.model, *case.inputs, **case.step)
        actual = gradients(way.model, case)
        rows.append(
            {
                "model": case.name,
                "way": way.name,
                "budget": way.budget_bytes,
                "predicted": way.predicted.peak_bytes,
                "measured": measured.peak_bytes,
                "is_equal": way.predicted == measured,
                "gradients": all(map(torch.equal, actual, expected)),
                "time_ratio": statistics.median(a / b for a, b in zip(own, seconds[0], strict=True)),
                "policies": way.policies,
            }
        )
    return rows


def ways_of(case: Case) -> Iterator[Way]:
    """Yield the unchanged model, plans at several budgets, and the library's own checkpointing."""
    plain = predict(case.model, *case.inputs, **case.step)
    yield Way("unchanged", case.model, plain)
    everything = apply_budget(copy.deepcopy(case.model), *case.inputs, budget=2 * plain.peak_bytes, **case.step)
    least = everything.points[0].peak_bytes
    for share in SHARES:
        fitted = copy.deepcopy(case.model)
        budget = least + round(share * (plain.peak_bytes - least))
        chosen = apply_budget(fitted, *case.inputs, budget=budget, **case.step)
        counts = Counter(type(unit.policy).__name__ for unit in chosen.units)
        policies = ", ".join(f"{counts[kind]} {kind}" for kind in sorted(counts))
        yield Way(f"budget at {100 * share:.0f} %", fitted, chosen.memory, budget, policies)
    own = copy.deepcopy(case.model)
    getattr(own, case.switch)()
    yield Way(f"`{case.switch}()`", own, predict(own, *case.inputs, **case.step))


def gradients(model: nn.Module, case: Case) -> list[Tensor]:
    """Return the gradients of a step from a fixed random state; zeros where a parameter has none."""
    buffers = copy.deepcopy(dict(model.named_buffers()))
    torch.manual_seed(1)
    run(model, case)
    result = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return result


def run(model: nn.Module, case: Case) -> None:
    """Run the forward and the backward pass."""
    model.zero_grad()
    output = model(*case.inputs, **case.kwargs)
    losses = [leaf.sum() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    (sum(losses) if case.loss is None else case.loss(output)).backward()


def time_in_turns(ways: Sequence[Way], case: Case, num_rounds: int) -> list[list[float]]:
    """Return the processor time of a step of each way, one per round.

    Rounds start with different ways. The first round warms up.
    """
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(num_rounds + 1):
        start = turn % len(ways)
        for index in [*range(start, len(ways)), *range(start)]:
            gc.collect()  # so that a way does not pay for collecting another one's garbage
            begin = time.process_time()
            run(ways[index].model, case)
            seconds[index].append(time.process_time() - begin)
            ways[index].model.zero_grad()
    return [times[1:] for times in seconds]


# Page -----------------------------------------------------------------------------------------------------------------


def write(folder: Path, command: str, rows: Sequence[Row], left_out: Sequence[str], given: argparse.Namespace) -> None:
    """Write the page and the CSV."""
    stem = f"any-model_{hardware_name()}_{datetime.date.today()}"
    write_csv(rows, folder / f"{stem}.csv")
    versions = {name: version(name) for name in ("timm", "transformers")}
    titles = ["model", "way", "policies of the blocks", "budget, MiB", "predicted peak, MiB", "measured peak, MiB"]
    titles += ["equal to the byte", "gradients bit for bit", "processor time / unchanged"]
    body = [
        [
            row["model"],
            row["way"],
            row["policies"],
            "" if row["budget"] is None else mib(row["budget"]),
            mib(row["predicted"]),
            mib(row["measured"]),
            "yes" if row["is_equal"] else "no",
            "yes" if row["gradients"] else "no",
            f"{row['time_ratio']:.2f}",
        ]
        for row in rows
    ]
    lines = [
        "# Models of other libraries under memory budgets",
        "",
        *describe_machine(command, peers=versions),
        "",
        f"A step on {given.batch} images of 3x{given.image}x{given.image}, or on {given.batch} sequences of "
        f"{given.length} tokens, the first of them padded, with SGD and momentum. `revnet.apply_budget` found the "
        "blocks and chose their policies, without further arguments. A budget of 0 % is the least memory of any plan, "
        "and 100 % is the peak of the unchanged model. All fields of the predicted and the measured memory are "
        f"compared. Times are medians of {given.rounds} rounds, in which the ways take turns, in processor time, on "
        "which other programs have little effect.",
        "",
        *table(titles, body),
        f"The last two models were drawn with the seed {given.seed}. Drawn before them and left out:",
        "",
        *(left_out or ["- none"]),
    ]
    (folder / f"{stem}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
