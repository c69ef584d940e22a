"""`revnet figure`."""

from __future__ import annotations

import dataclasses
import difflib
import shlex
from pathlib import Path
from typing import Any

from revnet.training import TrainConfig

_FIGURES = ("gradient-angle", "complexity.costs")
_EVERY = 50


def figure(
    name: str,
    *,
    output_dir: str | None = None,
    every: int | None = None,
    reference: bool = False,
    quick: bool = False,
    **settings: Any,
) -> None:
    """Draw a figure of the paper anew, from measurements made here: a page, tables as CSV and a picture.

    gradient-angle trains a reversible model and its stored twin from the same seed. On the way it compares gradients of
    rebuilt activations with those of stored ones, at the same weights and batch; it changes nothing of the training.
    The settings of `revnet train` are its options. Without any, digits take about two minutes on two cores.

    complexity is the paper's table of memory and compute against depth: naive, checkpointed, recursively checkpointed
    and reversible, bytes and FLOPs counted, step times measured. About three minutes on two cores; leave the machine
    alone meanwhile.

    Examples:
        revnet figure gradient-angle
        revnet figure gradient-angle --every 10 --reference --epochs 20
        revnet figure gradient-angle --config cifar10/quick/revnet38 --every 100 --output-dir results
        revnet figure complexity --quick

    Args:
        name: Which figure: gradient-angle or complexity.
        output_dir: Folder for the page, its CSV and its picture; `benchmarks/results` if there is one, else this one.
        every: For gradient-angle: updates from one measurement to the next; 50 if not given.
        reference: For gradient-angle: compare stored gradients in float32 with those in float64, too.
        quick: For complexity: shallow stacks only, for a look in some seconds.
        settings: See `TrainConfig`; of these, complexity takes `--device` only.
    """
    if name not in _FIGURES:
        close = difflib.get_close_matches(name, _FIGURES, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"the figures are {' and '.join(_FIGURES)}."
        raise ValueError(f"`{name}` is no figure; {hint}")
    config = TrainConfig(**settings)
    results = Path("benchmarks/results")
    folder = Path(output_dir).expanduser() if output_dir is not None else results if results.is_dir() else Path()
    if name == "gradient-angle":
        if quick:
            raise ValueError("`--quick` is for complexity; make gradient-angle short by fewer `--epochs`.")
        if every is not None and every < 1:
            raise ValueError(f"`--every` (={every}) must be 1 or more; 50 is usual.")
        page = _gradient_angle(config, folder, every or _EVERY, reference)
    else:
        misplaced = ["every"] * (every is not None) + ["reference"] * reference + sorted(settings.keys() - {"device"})
        if misplaced:
            raise ValueError(f"`--{_dashed(misplaced[0])}` is for gradient-angle; leave it out.")
        page = _complexity(config.device, folder, quick)
    print(f"wrote {page}, its CSV and its picture")


def _gradient_angle(config: TrainConfig, folder: Path, every: int, reference: bool) -> Path:
    from revnet.paper import run_gradient_angle  # PyTorch and Lightning load here

    command = ["revnet figure gradient-angle", f"--every {every}", *["--reference"] * reference]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            command.append(f"--{_dashed(field.name)} {_spell(value)}")
    return run_gradient_angle(config, folder, " ".join(command), every=every, with_reference=reference)


def _complexity(device: str, folder: Path, quick: bool) -> Path:
    if device == "mps":
        raise ValueError("`--device` (=mps) must be auto, cpu or cuda for complexity.")

    import torch

    from revnet.paper import run_complexity
    from revnet.paper.complexity.costs import QUICK_COMPLEXITY, ComplexitySettings

    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ValueError("`--device` (=cuda) is not available to this PyTorch; pass cpu.")
    place = torch.device("cuda" if has_cuda and device != "cpu" else "cpu")
    settings = dataclasses.replace(QUICK_COMPLEXITY if quick else ComplexitySettings(), device=place)
    command = ["revnet figure complexity", *["--quick"] * quick, f"--device {place.type}"]
    return run_complexity(settings, folder, " ".join(command))


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _spell(value: Any) -> str:
    """A setting as the command line takes it."""
    if isinstance(value, tuple):
        return str(list(value)).replace(" ", "")
    return shlex.quote(value) if isinstance(value, str) else "null" if value is None else str(value).lower()
