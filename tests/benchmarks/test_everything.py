"""The page that compares revnet with everything else is made of the results of `revnet bench`."""

import csv
from importlib import import_module

import pytest

from revnet.bench import CASES, METHODS, PITFALLS

DEPTHS = (4, 16)


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture
def stored(tmp_path):
    """Return results of all methods but the last one. The number of a method grows with its place."""
    engine, host = [], []
    for place, method in enumerate(METHODS[:-1], start=1):
        for case in CASES:
            common = {"case": case.name, "method": method.name}
            engine += [
                common | {"depth": depth, "quantity": "peak", "value": place * depth * 2**20} for depth in DEPTHS
            ]
            engine.append(common | {"depth": 16, "quantity": "step / plain, median", "value": 1 + place / 100})
            name = "revnet, Reverse()" if method.name == "revnet" else method.name
            host.append({"case": case.name, "method": name, "ratio_median": 2.0})
        for index, pitfall in enumerate(PITFALLS):
            common = {"case": "pitfalls", "depth": "", "method": method.name, "quantity": pitfall.name}
            engine.append(common | {"value": "wrong" if index < place else "ok"})
    engine.append({"case": "conv", "depth": 16, "method": METHODS[-1].name, "quantity": "peak", "value": ""})
    return write(tmp_path / "engine.csv", engine), write(tmp_path / "host.csv", host)


def test_collects_one_row_for_each_method(stored):
    script = import_module("everything")
    rows, depths = script.collect(*stored)
    assert depths == list(DEPTHS)
    assert [row["method"] for row in rows] == [method.name for method in METHODS]
    ours = next(row for row in rows if row["method"] == "revnet")
    place = [method.name for method in METHODS].index("revnet") + 1
    assert ours["conv, 16"] == place * 16
    assert ours["transformer, step"] == 1 + place / 100
    assert ours["conv, host"] == 2
    assert ours["pitfalls"] == place
    assert set(rows[-1].values()) == {METHODS[-1].name, None}


def test_names_what_is_better(stored):
    script = import_module("everything")
    rows, depths = script.collect(*stored)
    lines = list(script.better_than_ours(rows, script.columns(depths)))
    earlier = ", ".join(method.name for method in METHODS[: [method.name for method in METHODS].index("revnet")])
    assert f"- less memory for conv, 16 blocks: {earlier}" in lines
    assert "- less processor time on tiny tensors for conv: none" in lines


def test_writes_page_and_picture(stored, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "memory.png"
    arguments = ["--stored", *map(str, stored), "--out-dir", str(tmp_path), "--picture", str(picture)]
    import_module("everything").main(arguments)
    assert picture.read_bytes().startswith(b"\x89PNG")
    (page,) = tmp_path.glob("everything_*.md")
    assert page.read_text() == capsys.readouterr().out
    assert "| - |" in page.read_text()
