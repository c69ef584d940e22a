import pytest

from revnet._outside_text import csv_cell, encodable, file_stem, printable, shorten


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tabby cat", "tabby cat"),
        ("Käse, 猫, \U0001f408\u200d\u2b1b, a\u3000b", "Käse, 猫, \U0001f408\u200d\u2b1b, a\u3000b"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\nb\tc\r\x85\u2028", r"a\nb\tc\r\x85\u2028"),
        ("\x9b31m", r"\x9b31m"),
        ("abc\u202egpj.exe", r"abc\u202egpj.exe"),
        ("caf\udce9", r"caf\udce9"),
        ("", ""),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("cat", "cat"),
        ("=cmd|' /C calc'!A0", "'=cmd|' /C calc'!A0"),
        ("+1", "'+1"),
        ("-x.jpg", "'-x.jpg"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", r"\t=1"),
        ("\x1b[2J", r"\x1b[2J"),
        ("caf\udce9.jpg", r"caf\udce9.jpg"),
        ("a=b", "a=b"),
        ("", ""),
    ],
)
def test_csv_cell(text, cell):
    assert csv_cell(text) == cell


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("0123456789", "0123456789"),
        ("01234567890", "0123456..."),
        ("9" * 10**6, "9999999..."),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x1b" * 4, r"\x1b\x1..."[:7] + "..."),
        ("", ""),
    ],
)
def test_shorten(text, shown):
    assert shorten(text, 10) == shown
    assert len(shorten(text)) <= 60


@pytest.mark.parametrize(
    ("text", "stem"),
    [
        ("Meine schönen Fotos", "Meine-schönen-Fotos"),
        ("Fu\u0308chse", "Füchse"),
        ("猫_1.2", "猫-1.2"),
        ("../a/b\0:c", "a-b-c"),
        ("caf\udce9", "caf"),
        ("\U0001f408", ""),
    ],
)
def test_file_stem_keeps_letters(text, stem):
    assert file_stem(text) == stem


def test_file_stem_is_short():
    assert len(file_stem("ü" * 500).encode()) == 120


def test_encodable():
    assert encodable("caf\udce9 \u732b") == "caf? \u732b"
