import pytest

from revnet._units import format_rate, format_seconds


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0835, "83.5 ms"), (0.00004, "0.0 ms"), (83.403, "83.4 s"), (150, "2.5 min")]
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(1520, "1,520 images/s"), (12.4, "12 images/s"), (9.96, "10 images/s"), (0.42, "0.42 images/s")]
)
def test_rates(rate, text):
    assert format_rate(rate, "images") == text
