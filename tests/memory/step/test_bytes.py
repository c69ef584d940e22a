import pytest

from revnet.memory import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3_355_443, "3.2 MiB"),
        (5 * 2**30, "5.00 GiB"),
        (2**30 - 1, "1.00 GiB"),
        (3 * 2**40, "3.00 TiB"),
        (2**63, "8,192.00 PiB"),
    ],
)
def test_format_bytes(num_bytes, text):
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("value", "num_bytes"),
    [
        ("16GiB", 16 * 2**30),
        ("16 gib", 16 * 2**30),
        ("500MB", 500_000_000),
        ("0.1 GB", 100_000_000),
        ("0.5GiB", 2**29),
        (".5g", 2**29),
        (" 80G ", 80 * 2**30),
        ("3k", 3072),
        ("2 TiB", 2**41),
        ("12B", 12),
        ("1.5b", 1),
        (12, 12),
    ],
)
def test_parse_bytes(value, num_bytes):
    assert parse_bytes(value) == num_bytes


@pytest.mark.parametrize(
    "value", ["16 apples", "16", "", "GiB", "-1GiB", "1e3MB", "nan GiB", "inf", "1,5 GiB", "1 GiB!", "\u0664GiB"]
)
def test_rejects_text_without_number_or_unit(value):
    with pytest.raises(
        ValueError, match=r"must be a number of bytes with a unit, such as '16GiB' or '500MB'.$"
    ) as caught:
        parse_bytes(value)
    assert str(caught.value).startswith(f"`budget` (={value!r}) must")


@pytest.mark.parametrize("value", ["0GiB", "0.2B", 0, -5])
def test_rejects_a_number_that_is_not_positive(value):
    with pytest.raises(ValueError, match=rf"^`limit` \(={value!r}\) must be positive, such as '16GiB' or '500MB'\.$"):
        parse_bytes(value, "limit")


@pytest.mark.parametrize("value", [2**63, 10**30, 10**5000, -(10**5000)], ids=["2^63", "10^30", "10^5000", "-10^5000"])
def test_rejects_more_bytes_than_a_device_can_address(value):
    with pytest.raises(
        ValueError, match=r"^`limit` \(an integer of [\d,]+ bits\) must be positive and below 2\^63, such"
    ):
        parse_bytes(value, "limit")


@pytest.mark.parametrize("value", [True, 1e9, float("nan"), None])
def test_rejects_other_types(value):
    with pytest.raises(TypeError, match=r"must be a number of bytes with a unit, .*, or an int of bytes\.$"):
        parse_bytes(value)
