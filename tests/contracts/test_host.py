"""The host cost of a plain step, in numbers that are equal on every machine: Python calls inside revnet.

Time is not tested, because it is noise on a shared machine. `revnet bench --host` measures it.
"""

import pytest
import torch

from revnet._torch_internals import HAS_ACCELERATOR
from revnet.bench.host import HostRunner
from revnet.bench.host_cases import HOST_CASES, HOST_METHODS

NUM_BLOCKS = 16
MOST_CALLS = {"conv": 1_811, "transformer": 1_438}
"""Maximum Python calls inside revnet in one step of 16 blocks under `Reverse()`, as counted by Python 3.11.

Lower these when a change saves calls. A change that needs more must explain why.
"""
MOST_FILES = 7
"""Maximum number of files of revnet that these calls run through."""
MOST_LINES = 1_200
"""Maximum number of lines in these files."""

all_host_cases = pytest.mark.parametrize("case", HOST_CASES, ids=lambda case: case.name)


def reverse(case, num_blocks):
    (method,) = [method for method in HOST_METHODS if method.name == "revnet, Reverse()"]
    return HostRunner(method, case, case.functions(num_blocks, torch.device("cpu")))


@pytest.fixture
def calls(case):
    counted = reverse(case, NUM_BLOCKS).count_calls()
    if HAS_ACCELERATOR:  # Tensors can move there, so each residual function also compares the devices of its tensors.
        (plan,) = [path for path in counted.by_file if path.name == "_plan.py"]
        assert counted.by_file.pop(plan) == 2 * NUM_BLOCKS
    return counted


@all_host_cases
def test_plain_step_makes_no_more_calls(case, calls):
    assert calls.num_calls <= MOST_CALLS[case.name], (
        f"{calls.num_calls:,} Python calls inside revnet ({calls.num_calls / (2 * NUM_BLOCKS):.1f} per half-block): "
        + ", ".join(f"{path.name} {number:,}" for path, number in calls.by_file.most_common())
    )


@all_host_cases
def test_plain_step_runs_through_few_files(case, calls):
    assert calls.num_files <= MOST_FILES
    assert calls.num_lines <= MOST_LINES


@all_host_cases
def test_later_steps_make_the_same_calls(case):
    """Nothing piles up from step to step."""
    runner = reverse(case, 2)
    first = runner.count_calls()
    for x in runner.inputs(5):
        runner.step(x)
    assert runner.count_calls().by_file == first.by_file
