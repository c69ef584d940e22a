"""Ways to reduce the drift of converted blocks."""

from dataclasses import replace

from revnet.conversion._methods import AbstractMethod
from revnet.conversion._scheme import Scheme
from revnet.coupling import Scaled

_FRACTION_BITS = 14


def remedies_for(method: AbstractMethod, num_branches: int | None) -> tuple[str, ...]:
    """Return what helps if the blocks of a row drift, in sentences, the easiest first; empty if the method is exact.

    Args:
        method: The method of the row.
        num_branches: Number of branches of its blocks; None if blocks are whole.
    """
    scheme = method.scheme(num_branches)
    if not isinstance(scheme, Scheme):
        return ()
    remedies = []
    factors = [abs(coupling.a) for coupling in scheme.couplings if isinstance(coupling, Scaled)]
    if factors and (exact := _exact_form(method, num_branches)) is not None:
        remedies.append(f"Reverse exactly, on a fixed-point grid: `revnet.conversion.set_method(model, {exact})`.")
    if factors and min(factors) < 1:
        remedies.append(
            "Or move the coefficients toward 1 with `revnet.conversion.set_method`, and train the network with them: "
            f"undoing a function now divides errors by {min(factors):.2g}."
        )
    return tuple(remedies)


def _exact_form(method: AbstractMethod, num_branches: int | None) -> AbstractMethod | None:
    """Return the same method in fixed-point arithmetic, or None if it has no such form."""
    try:
        exact: AbstractMethod = replace(method, fraction_bits=_FRACTION_BITS)  # type: ignore[type-var]
        return exact if isinstance(exact.scheme(num_branches), Scheme) else None
    except (TypeError, ValueError):  # Not a data class of ours, or coefficients that do not fit the grid.
        return None
