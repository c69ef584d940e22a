"""Whose mistake an error is: what revnet itself raises speaks to the user."""

from __future__ import annotations

import traceback
from pathlib import Path

import revnet


def is_raised_by_revnet(error: Exception) -> bool:
    """Whether a statement of revnet's raised `error`, in words for the user; one out of an expression is a bug."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return Path(revnet.__file__).parent in Path(place.filename).parents and (place.line or "").startswith("raise ")
