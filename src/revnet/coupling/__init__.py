"""Couplings: the rules that combine a residual with a stream and compute the stream back.

One half of a reversible block updates a stream `x` with the output of a residual function that reads another stream.
The coupling defines this update and its inverse. The additive coupling computes `y = x + residual` and
`x = y - residual`.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet.coupling._abstract import AbstractCoupling as AbstractCoupling
from revnet.coupling._additive import Additive as Additive
from revnet.coupling._affine import Affine as Affine
from revnet.coupling._bdia import BDIA as BDIA
from revnet.coupling._exact_scaled import ExactScaled as ExactScaled
from revnet.coupling._fixed_point import FixedPoint as FixedPoint
from revnet.coupling._momentum import Momentum as Momentum
from revnet.coupling._scaled import Scaled as Scaled
