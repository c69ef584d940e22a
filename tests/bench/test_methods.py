"""All methods compute the same gradients."""

import pytest
import torch

from revnet.bench import CASES, METHODS
from revnet.bench._runner import Runner, gradient_error
from revnet.bench.methods import PLAIN, Method
from tests.bench.methods import marked

CPU = torch.device("cpu")


def runnable(method):
    if method.missing():
        pytest.skip(method.missing())
    return method


@pytest.mark.filterwarnings("ignore")  # PyTorch warns about old code in other libraries
@pytest.mark.parametrize("method", marked(METHODS))
def test_gradients_equal_plain_autograd(method, case):
    functions = [(f.double(), g.double()) for f, g in case.functions(5, CPU)]
    expected = Runner(PLAIN, case, functions, CPU, torch.float64).gradients()
    actual = Runner(runnable(method), case, functions, CPU, torch.float64).gradients()
    assert len(actual) == 5 * 2 * 2
    assert gradient_error(actual, expected) < 1e-12  # the rounding of five reconstructions


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", marked(METHODS))
def test_steps_are_independent(method, case):
    runner = Runner(runnable(method), case, case.functions(3, CPU), CPU)
    first = runner.gradients()
    assert runner.step_seconds() > 0
    assert runner.forward_seconds() > 0
    assert runner.memory() == runner.memory()
    assert gradient_error(runner.gradients(), first) == 0


def test_names_are_unique():
    assert len({method.name for method in METHODS}) == len(METHODS)
    assert len({case.name for case in CASES}) == len(CASES)


def test_missing_library_shows_the_install_command():
    library = Method("library", "", PLAIN.make, "no-such-package-of-revnet")
    assert library.missing() == "not installed: pip install --no-deps no-such-package-of-revnet"
    assert library.version() is None
    assert PLAIN.missing() is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_fit_their_streams(case):
    with torch.device("meta"):
        for function in case.make_block():
            assert function(torch.empty(case.stream_shape)).shape == case.stream_shape
    assert all(torch.equal(a, b) for a, b in zip(case.streams(1), case.streams(1), strict=True))


def test_requirements_file_lists_the_libraries():
    from pathlib import Path

    lines = (Path(__file__).parents[2] / "benchmarks" / "peers.txt").read_text().splitlines()
    listed = {line.split("==")[0] for line in lines if not line.startswith("#")}
    assert listed == {method.package for method in METHODS if method.package}
