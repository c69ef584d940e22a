"""Freeze parameters by patterns of their names."""

import difflib
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def freeze_parameters(model: nn.Module, patterns: str) -> None:
    """Stop the training of the parameters whose names match a pattern.

    Args:
        model: The network.
        patterns: Patterns separated by commas, with `*`, `?` and `[...]` as in file names. A pattern that matches the
            name of a module freezes all of its parameters.

    Raises:
        ValueError: A pattern matches nothing, or no parameter would be left to train.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns.split(","):
        pattern = pattern.strip()
        names = [name for name in parameters if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
        if not names:
            raise ValueError(
                f"`freeze` (={patterns!r}): {pattern!r} matches no parameter; {_hint(pattern, parameters)}"
            )
        for name in names:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"`freeze` (={patterns!r}) leaves no parameter to train; leave out a pattern.")


def describe_frozen(model: nn.Module) -> str:
    """Return the numbers of frozen and of all parameters as text."""
    counts = [parameter.numel() for parameter in model.parameters() if not parameter.requires_grad]
    total = sum(parameter.numel() for parameter in model.parameters())
    return f"{sum(counts):,} of {total:,} parameters"


def frozen_norms(model: nn.Module) -> list[nn.Module]:
    """Return the batch norms whose parameters are all frozen."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    parameters = {norm: list(norm.parameters()) for norm in norms}
    return [norm for norm in norms if parameters[norm] and not any(p.requires_grad for p in parameters[norm])]


def _hint(pattern: str, parameters: dict[str, nn.Parameter]) -> str:
    parts = dict.fromkeys(
        ".".join(pieces[: depth + 1])
        for name in parameters
        for pieces in [name.split(".")]
        for depth in range(len(pieces))
    )
    close = difflib.get_close_matches(pattern, parts, n=1)
    first = ", ".join(dict.fromkeys(name.partition(".")[0] for name in parameters))
    return f"did you mean {close[0]!r}?" if close else f"the parts of the network are {first}."
