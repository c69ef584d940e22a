import pytest

from revnet._units import counted, counted_samples, format_loss, format_perplexity, format_rate, format_seconds


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0835, "83.5 ms"), (0.00004, "0.04 ms"), (83.403, "83.4 s"), (150, "2.5 min"), (9000, "2.5 h")],
)
def test_seconds(seconds, text):
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (1520, "1,520 images/s"),
        (12.4, "12 images/s"),
        (9.96, "10 images/s"),
        (0.42, "0.42 images/s"),
        (0.02, "1.2 images/min"),
        (0.001, "3.6 images/h"),
    ],
)
def test_rates(rate, text):
    assert format_rate(rate, "images") == text


@pytest.mark.parametrize(
    ("loss", "text"),
    [(2.30259, "2.3026"), (-12.5, "-12.5000"), (0, "0.0000"), (4.2e-7, "4.2000e-07"), (1e12, "1.0000e+12")],
)
def test_losses(loss, text):
    assert format_loss(loss) == text


def test_losses_that_are_not_finite():
    assert (format_loss(float("nan")), format_loss(float("inf"))) == ("nan", "inf")


@pytest.mark.parametrize(
    ("nats", "text"), [(0, "1.00"), (1.5, "4.48"), (10, "22,026.47"), (20, "4.85e+08"), (1e5, "1.01e+304")]
)
def test_perplexities(nats, text):
    assert format_perplexity(nats) == text


def test_nouns_agree_with_their_number():
    assert [counted(number, "image") for number in (0, 1, 2, 1000)] == [
        "0 images",
        "1 image",
        "2 images",
        "1,000 images",
    ]
    assert [counted(number, "class", "classes") for number in (1, 3)] == ["1 class", "3 classes"]
    assert counted_samples(1, "windows of 16 characters") == "1 window of 16 characters"
    assert counted_samples(1000, "images") == "1,000 images"
