"""Measure how far rebuilt activations are from the true ones, and find a remedy.

Names that `revnet` itself does not export are provisional: they may change in any release.
"""

from revnet.numerics._conditioning import conditioning_penalty as conditioning_penalty
from revnet.numerics._drift import Drift as Drift
from revnet.numerics._drift_from_records import drift_of as drift_of
from revnet.numerics._measure_drift import measure_drift as measure_drift
from revnet.numerics._nondeterministic import find_nondeterministic as find_nondeterministic
