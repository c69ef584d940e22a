"""Convert a model of another library, and compare it with the original."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import revnet
from revnet._model_output import leaves_of_output
from revnet.cli._build import empty_inputs, fill_inputs
from revnet.cli._errors import UsageError, describe_error
from revnet.cli._model import build_model
from revnet.cli._step_flags import StepFlags
from revnet.conversion import BDIA, AbstractMethod, Consistent, Dr2Net, Rewire
from revnet.conversion._convert import block_lists
from revnet.data._require import require
from revnet.memory import format_bytes, predict
from revnet.models._sampling import evaluating

HOSTS = ("timm", "torchvision", "transformers")
"""Libraries whose models have names."""


def try_conversion(
    flags: StepFlags, blocks: Sequence[str] | None, method: str, size: float, fraction_bits: int, *, pretrained: bool
) -> Iterator[str]:
    """Yield the lines that `revnet convert` prints.

    Args:
        flags: The model and its inputs.
        blocks: Names of the lists of blocks; None to list them.
        method: Name of the method.
        size: Coefficient of the method.
        fraction_bits: Bits of the fraction of the streams; 0 for floating point.
        pretrained: Whether to load trained weights.

    Raises:
        UsageError: The model, its weights or its blocks do not exist.
    """
    model, build = load_model(flags.model, pretrained=pretrained)
    if blocks is None:
        raise UsageError(f"`--blocks` must name the lists of blocks of {flags.model}, which has {_lists_of(model)}.")
    # Seeded, so that the figure for trained weights is the same in each run.
    generator = torch.Generator().manual_seed(0)
    shapes = empty_inputs(flags)[1]
    inputs = fill_inputs(shapes, torch.device("cpu"), num_rows=_num_rows(model), generator=generator)
    autocast = torch.bfloat16 if flags.precision == "bf16-mixed" else None
    chosen = _method(method, size, fraction_bits or None)
    before = predict(model, *inputs, autocast=autocast).activation_bytes
    expected = _outputs(model, inputs, autocast)
    report = revnet.convert(model, chosen, blocks=blocks)
    yield f"{report}\n"
    after = predict(model, *inputs, autocast=autocast).activation_bytes
    revnet.set_policy(model, "checkpoint")
    checkpointed = predict(model, *inputs, autocast=autocast).activation_bytes
    revnet.set_policy(model, "reverse")
    yield f"activations of a step of {flags.batch} inputs, {flags.precision}, predicted"
    yield f"  original      {format_bytes(before)}"
    yield f"  converted     {format_bytes(after)}"
    yield f"  checkpointed  {format_bytes(checkpointed)} (the converted blocks, under `Checkpoint()`)\n"
    movement = _movement(_outputs(model, inputs, autocast), expected)
    yield f"outputs in evaluation mode {movement} ({flags.precision})\n"
    if fraction_bits:
        # The range of the streams is checked only in a pass that will be undone.
        with torch.autocast("cpu", enabled=autocast is not None):
            model(*inputs)
    yield from ("import revnet", f"from revnet.conversion import {type(chosen).__name__}", "", *build)
    yield f"revnet.convert(model, {chosen}, blocks={list(blocks)})"


def load_model(name: str, *, pretrained: bool) -> tuple[nn.Module, list[str]]:
    """Return a model in training mode, and the lines of Python that build it.

    Raises:
        UsageError: The model or its weights do not exist.
        MissingDependencyError: The library is not installed.
    """
    library, _, rest = name.partition(":")
    if library not in HOSTS:
        if pretrained:
            raise UsageError("`--pretrained` is for models of other libraries; load the weights of your own yourself.")
        return build_model(name, is_real=True), [f"from {library} import {rest}", f"model = {rest}()"]
    host: Any = require(library, package=library, purpose=f"the model `{name}`")
    try:
        model, lines = _build(host, library, rest, pretrained)
    except Exception as error:
        raise UsageError(f"`MODEL` (={name}) cannot be built: {describe_error(error)}") from error
    return model.train(), lines


def _build(host: Any, library: str, name: str, pretrained: bool) -> tuple[nn.Module, list[str]]:
    if library == "timm":
        call = f"timm.create_model({name!r}, pretrained={pretrained})"
        return host.create_model(name, pretrained=pretrained), ["import timm", f"model = {call}"]
    if library == "torchvision":
        weights = "DEFAULT" if pretrained else None
        call = f"torchvision.models.get_model({name!r}, weights={weights!r})"
        return host.models.get_model(name, weights=weights), ["import torchvision", f"model = {call}"]
    place = os.path.expanduser(name)  # noqa: PTH111 - a name on the hub is not a path
    if place.startswith((".", os.sep)) and not Path(place).is_dir():
        raise UsageError(f"'{place}' is not a folder.")
    config = host.AutoConfig.from_pretrained(place, local_files_only=Path(place).is_dir())
    option = ", use_cache=False" if hasattr(config, "use_cache") else ""
    if option:
        config.use_cache = False
    kind = (config.architectures or ["AutoModel"])[0]
    model_type = getattr(host, kind)
    if not pretrained:
        model = model_type(config) if kind != "AutoModel" else model_type.from_config(config)
        build = f"model = {kind}(config)" if kind != "AutoModel" else "model = AutoModel.from_config(config)"
        return model, [
            f"from transformers import AutoConfig, {kind}",
            f"config = AutoConfig.from_pretrained({name!r}{option})",
            build,
        ]
    lines = [f"from transformers import {kind}", f"model = {kind}.from_pretrained({name!r}{option})"]
    return model_type.from_pretrained(place, config=config), lines


def _lists_of(model: nn.Module) -> str:
    lists = [f"{name} ({len(blocks)})" for name, blocks in block_lists(model).items() if len(blocks) > 1]
    return ", ".join(lists[:8]) + (", ..." if len(lists) > 8 else "") if lists else "none"


def _num_rows(model: nn.Module) -> int:
    """Return the number of rows of the smallest embedding, or 1 if the model has no embedding."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    return min([table.num_embeddings for table in tables], default=1)


@torch.no_grad()
def _outputs(model: nn.Module, inputs: tuple[Tensor, ...], autocast: torch.dtype | None) -> list[Tensor]:
    with evaluating(model), torch.autocast("cpu", autocast, enabled=autocast is not None):
        leaves = leaves_of_output(model(*inputs))
    return [leaf.float() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _movement(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """Return how far outputs move from the expected ones, as text."""
    shares = []
    for one, other in zip(outputs, expected, strict=True):
        moved = (one - other).abs()
        if moved.any() or other.any():
            shares.append(moved.max() / other.abs().max())
    if not shares:
        return "are all 0 for these inputs, so how far they move is unknown"
    # The `max` of Python would pass over NaN.
    return f"move by {float(torch.stack(shares).max()):.1e}, relative to the largest one"


def _method(name: str, size: float, fraction_bits: int | None) -> AbstractMethod:
    if name == "bdia":
        return BDIA(size, fraction_bits or 14)
    if name == "dr2net":
        return Dr2Net(1 - size, size, fraction_bits)
    return Rewire(fraction_bits) if name == "rewire" else Consistent(size, fraction_bits)
