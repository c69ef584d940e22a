"""The picture of the front page is drawn from the stored result of `revnet bench`."""

import sys
from importlib import import_module

import pytest


def test_reads_the_peaks_of_four_methods():
    front_page = import_module("front_page")
    peaks = front_page.read_peaks(front_page.RESULT)
    assert [depth for depth, _ in peaks["revnet"]] == [4, 16, 64, 256]
    assert {round(peak) for _, peak in peaks["revnet"]} == {36}
    assert peaks["plain"][-1] == (64, pytest.approx(2064.1, abs=0.1))


def test_draws_a_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "memory.png"
    monkeypatch.setattr(sys, "argv", ["front_page.py", "--picture", str(picture)])
    import_module("front_page").main()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in capsys.readouterr().out
