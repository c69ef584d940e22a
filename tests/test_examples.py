"""The examples in the docstrings of the API run and print what they show."""

import doctest
import textwrap

import pytest
import torch

import revnet
from revnet import coupling, distributed, nn, optim

pytestmark = pytest.mark.usefixtures("own_temporary_folder")
MOST_COLUMNS = 88


def documented_objects():
    """Return the stable API, all couplings, and all of `distributed`, `nn` and `optim`, by qualified name."""
    objects = {f"revnet.{name}": getattr(revnet, name) for name in revnet.__all__}
    for room in (coupling, distributed, nn, optim):
        for name, value in vars(room).items():
            is_new = not any(value is known for known in objects.values())
            if name[0] != "_" and getattr(value, "__module__", "").startswith("revnet.") and is_new:
                objects[f"{room.__name__}.{name}"] = value
    return objects


OBJECTS = documented_objects()
each_object = pytest.mark.parametrize("name", OBJECTS)


def example_of(name):
    (test,) = doctest.DocTestFinder(recurse=False).find(OBJECTS[name], name, globs={})
    return test


def test_objects_are_found():
    assert {"revnet.ReversibleBlock", "revnet.coupling.Affine", "revnet.nn.MomentumBlock"} <= OBJECTS.keys()
    assert "revnet.nn.ReversibleBlock" not in OBJECTS  # once is enough


@each_object
def test_has_an_example(name):
    assert "Example:\n" in OBJECTS[name].__doc__
    assert len(example_of(name).examples) > 0


@each_object
def test_example_prints_what_it_shows(name):
    torch.manual_seed(0)
    output = []
    result = doctest.DocTestRunner().run(example_of(name), out=output.append)
    assert result.failed == 0, "".join(output)


@each_object
def test_example_is_narrow(name):
    lines = textwrap.dedent(OBJECTS[name].__doc__.partition("Example:\n")[2]).splitlines()
    assert [line for line in lines if len(line) > MOST_COLUMNS] == []
