"""Checks for the bound on the reconstruction error."""

import torch

from revnet._checks import describe, is_number
from revnet.engine._tracing import refuse


def checked_tolerance(tolerance: float | None) -> float | None:
    """Return the tolerance as a float.

    Raises:
        ValueError: It is neither None nor a number between 0 and 1.
    """
    if tolerance is None:
        return None
    if not is_number(tolerance) or not 0 < tolerance < 1:
        raise ValueError(
            f"`tolerance` (={describe(tolerance)}) must be a relative error between 0 and 1, such as 1e-3, or None."
        )
    return float(tolerance)


def refuse_to_compile() -> None:
    """Raise under `torch.compile`, where the engine cannot run blocks forward again."""
    if torch.compiler.is_dynamo_compiling():
        refuse(
            "a ReversibleSequential with a `tolerance` cannot be compiled as a whole; reverse exactly with "
            "`set_coupling(model, FixedPoint())`, or compile the residual functions: `block.f.compile()`."
        )
