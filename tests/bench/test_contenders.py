"""All ways of running compute the same."""

import pytest
import torch

from revnet.bench import CASES, CONTENDERS
from revnet.bench._step import Subject, gradient_error
from revnet.bench.contenders import PLAIN, Contender

CPU = torch.device("cpu")


def runnable(contender):
    if contender.missing():
        pytest.skip(contender.missing())
    return contender


@pytest.mark.filterwarnings("ignore")  # what the peers' old code has to hear from PyTorch
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_gradients_are_plain_autograds(contender, case):
    functions = [(f.double(), g.double()) for f, g in case.functions(5, CPU)]
    expected = Subject(PLAIN, case, functions, CPU, torch.float64).gradients()
    actual = Subject(runnable(contender), case, functions, CPU, torch.float64).gradients()
    assert len(actual) == 5 * 2 * 2
    assert gradient_error(actual, expected) < 1e-12  # the rounding of five reconstructions


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda contender: contender.name)
def test_stepping_leaves_nothing_that_changes_the_next_step(contender, case):
    subject = Subject(runnable(contender), case, case.functions(3, CPU), CPU)
    first = subject.gradients()
    assert subject.step_seconds() > 0
    assert subject.forward_seconds() > 0
    assert subject.memory() == subject.memory()
    assert gradient_error(subject.gradients(), first) == 0


def test_names_and_kinds_are_listed_once():
    assert len({contender.name for contender in CONTENDERS}) == len(CONTENDERS)
    assert len({case.name for case in CASES}) == len(CASES)


def test_a_missing_peer_says_how_to_install_it():
    peer = Contender("peer", "", PLAIN.make, "no-such-package-of-revnet")
    assert peer.missing() == "not installed: pip install --no-deps no-such-package-of-revnet"
    assert peer.version() is None
    assert PLAIN.missing() is None


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cases_fit_their_streams(case):
    with torch.device("meta"):
        for function in case.make_block():
            assert function(torch.empty(case.stream_shape)).shape == case.stream_shape
    assert all(torch.equal(a, b) for a, b in zip(case.streams(1), case.streams(1), strict=True))


def test_the_peers_of_the_requirements_file_are_the_contenders():
    from pathlib import Path

    lines = (Path(__file__).parents[2] / "benchmarks" / "peers.txt").read_text().splitlines()
    listed = {line.split("==")[0] for line in lines if not line.startswith("#")}
    assert listed == {contender.package for contender in CONTENDERS if contender.package}
