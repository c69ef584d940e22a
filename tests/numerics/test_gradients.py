"""Angles and distances of known vectors."""

import math

import pytest
import torch

from revnet.numerics._gradients import angle_and_error


def vectors(*values):
    return [torch.tensor([value], dtype=torch.float32) for value in values]


@pytest.mark.parametrize(
    ("actual", "expected", "angle", "relative"),
    [
        ((1, 0), (1, 0), 0, 0),
        ((2, 0), (1, 0), 0, 1),
        ((1, 1), (1, 0), 45, 1),
        ((0, 3), (1, 0), 90, math.sqrt(10)),
        ((-1, 0), (1, 0), 180, 2),
        ((1, 1e-9), (1, 0), math.degrees(1e-9), 1e-9),
        ((1e-30, 1e-30), (1e-30, 0), 45, 1),
        ((0, 0), (0, 0), 0, 0),
        ((0, 0), (1, 0), 90, 1),
        ((1, 0), (0, 0), 90, math.inf),
    ],
)
def test_angles_of_known_vectors(actual, expected, angle, relative):
    assert angle_and_error(vectors(*actual), vectors(*expected)) == pytest.approx((angle, relative), rel=1e-6)


def test_the_angle_of_nan_is_nan():
    assert all(map(math.isnan, angle_and_error(vectors(math.nan, 1), vectors(1, 0))))
