"""What a plan knows of the structure of a function, and how it compares it."""

import struct

import pytest
from torch import nn

from revnet.engine._plan import ITEMS, plan_for


def small_function():
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


def held_by(plan):
    return tuple(value for values in plan.values for value in values)


def identities(plan, held):
    return plan.memory_of(id(held) + ITEMS).raw


def test_memory_of_a_tuple_is_the_identities_of_its_items():
    plan, held, _ = plan_for(small_function(), "f")
    assert identities(plan, held) == struct.pack(f"{len(held)}P", *map(id, held)) == plan.known[0]


def test_reads_nothing_of_a_function_without_tensors_and_children():
    plan, held, lasting = plan_for(nn.Identity(), "f")
    assert held == ()
    assert identities(plan, held) == b""
    assert lasting == set()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_notices_a_parameter_that_was_replaced_by_an_equal_one(name):
    function = small_function()
    plan, held, _ = plan_for(function, "f")
    setattr(function[0], name, nn.Parameter(getattr(function[0], name).detach().clone()))
    now = held_by(plan)
    assert identities(plan, now) != identities(plan, held)
    lasting = plan.fit(now, identities(plan, now))
    assert lasting is not None
    assert id(getattr(function[0], name)) in lasting


def test_does_not_fit_a_function_of_another_structure():
    function = small_function()
    plan, _, _ = plan_for(function, "f")
    function[0].bias = None
    now = held_by(plan)
    assert plan.fit(now, identities(plan, now)) is None
