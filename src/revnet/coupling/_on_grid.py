"""The base of couplings whose streams are numbers on a fixed-point grid."""

from typing import ClassVar

import torch
from torch import Tensor

from revnet.coupling._abstract import AbstractCoupling
from revnet.coupling._check import check_real
from revnet.coupling._fixed_point import FixedPoint


class AbstractGridCoupling(AbstractCoupling):
    """A coupling whose streams are the ones of a `FixedPoint` coupling, its `grid`."""

    is_exact: ClassVar[bool] = True

    _grid: FixedPoint

    @property
    def grid(self) -> FixedPoint:
        """Coupling that rounds the streams to the same numbers."""
        return self._grid

    def prepare(self, x: Tensor) -> Tensor:
        """Return the stream in float32 or float64, rounded to the grid.

        Raises:
            TypeError: The stream is complex.
        """
        check_real(x, self)
        return self._grid.prepare(x)

    def limit(self, dtype: torch.dtype) -> float:
        """Return 2^(significand bits - fraction_bits).

        Raises:
            TypeError: The dtype is neither float32 nor float64.
        """
        return self._grid.limit(dtype)

    def out_of_range_hint(self, magnitude: float, dtype: torch.dtype) -> str:
        """Return the setting with which a stream of this magnitude fits, if there is one."""
        return self._grid.out_of_range_hint(magnitude, dtype)
