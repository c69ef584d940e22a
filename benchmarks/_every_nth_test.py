"""A pytest plugin that runs a sample of the tests: `pytest -p _every_nth_test --every-nth 10` runs every 10th."""

from collections.abc import Sequence
from typing import Any

import pytest


def pytest_addoption(parser: Any) -> None:
    """Add the option."""
    parser.addoption("--every-nth", type=int, default=1, help="run every n-th test")


@pytest.hookimpl(trylast=True)  # after tests are deselected by their markers
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Deselect the other tests."""
    step = config.getoption("every_nth")
    others: Sequence[Any] = [item for index, item in enumerate(items) if index % step]
    items[:] = items[::step]
    config.hook.pytest_deselected(items=others)
