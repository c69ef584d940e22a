"""Methods of the benchmark as parameters of a test."""

from collections.abc import Sequence
from typing import Any

import pytest

from revnet.bench.methods import Method


def marked(methods: Sequence[Method]) -> list[Any]:
    """Return the methods, the ones that compile their code marked as slow."""
    return [
        pytest.param(method, marks=pytest.mark.slow, id=method.name)
        if method.is_compiled
        else pytest.param(method, id=method.name)
        for method in methods
    ]
