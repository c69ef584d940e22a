"""`revnet figure`."""

import dataclasses
import difflib
import shlex
from pathlib import Path
from typing import Any

from revnet._paths import expand_user
from revnet.cli._errors import UsageError
from revnet.cli._options import takes_settings
from revnet.training import TrainConfig

_FIGURES = ("gradient-angle", "complexity")
_DEFAULT_EVERY = 50


@takes_settings(TrainConfig)
def figure(
    name: str,
    *,
    out_dir: str | None = None,
    every: int | None = None,
    reference: bool = False,
    quick: bool = False,
    **settings: Any,
) -> None:
    """Reproduce a figure of the paper as a page, CSV tables and a picture.

    gradient-angle trains a reversible model and its stored twin from the same seed. During training it compares the
    gradients from rebuilt activations with the gradients from stored ones, at the same weights and batch; training
    itself is not affected. Its options are the settings of `revnet train`. By default it trains on digits, in about two
    minutes on two cores.

    complexity is the paper's table of memory and compute against depth: plain, checkpointed, recursively checkpointed
    and reversible. Bytes and FLOPs are counted, and step times are measured. It takes about three minutes on two cores;
    run nothing else on the machine.

    Examples:
        revnet figure gradient-angle
        revnet figure gradient-angle --every 10 --reference --epochs 20
        revnet figure gradient-angle --config cifar10/quick/revnet38 --out-dir results
        revnet figure complexity --quick

    Args:
        name: Name of the figure: gradient-angle or complexity.
        out_dir: Folder for the page, its CSV files and its picture; by default `benchmarks/results` if it exists,
            otherwise the current folder.
        every: For gradient-angle, number of updates between measurements; 50 by default.
        reference: For gradient-angle, also compare stored gradients in float32 with float64.
        quick: For complexity, measure only shallow stacks, in a few seconds.
        settings: Fields of `TrainConfig`. complexity takes only `--device`.
    """
    if name not in _FIGURES:
        close = difflib.get_close_matches(name, _FIGURES, n=1)
        hint = f"did you mean `{close[0]}`?" if close else f"the figures are {' and '.join(_FIGURES)}."
        raise UsageError(f"unknown figure `{name}`; {hint}")
    config = TrainConfig(**settings)
    results = Path("benchmarks/results")
    folder = expand_user(out_dir) if out_dir is not None else results if results.is_dir() else Path()
    if name == "gradient-angle":
        if quick:
            raise UsageError("`--quick` is for complexity; to shorten gradient-angle, pass fewer `--epochs`.")
        if every is not None and every < 1:
            raise UsageError(f"`--every` (={every}) must be 1 or more; 50 is usual.")
        page = _gradient_angle(config, folder, every or _DEFAULT_EVERY, reference)
    else:
        misplaced = ["every"] * (every is not None) + ["reference"] * reference + sorted(settings.keys() - {"device"})
        if misplaced:
            raise UsageError(f"`--{_dashed(misplaced[0])}` is for gradient-angle; leave it out.")
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
        raise UsageError("`--device` (=mps) must be auto, cpu or cuda for complexity.")

    import torch

    from revnet.paper import run_complexity
    from revnet.paper.complexity.costs import QUICK_COMPLEXITY, ComplexitySettings

    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise UsageError("`--device` (=cuda) is not available to this PyTorch; pass cpu.")
    torch_device = torch.device("cuda" if has_cuda and device != "cpu" else "cpu")
    settings = dataclasses.replace(QUICK_COMPLEXITY if quick else ComplexitySettings(), device=torch_device)
    command = ["revnet figure complexity", *["--quick"] * quick, f"--device {torch_device.type}"]
    return run_complexity(settings, folder, " ".join(command))


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _spell(value: Any) -> str:
    """Return a setting as it is written on the command line."""
    if isinstance(value, tuple):
        return str(list(value)).replace(" ", "")
    return shlex.quote(value) if isinstance(value, str) else "null" if value is None else str(value).lower()
