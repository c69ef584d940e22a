"""The networks in `examples/` learn, and their reversed bytes do not grow with depth."""

import re
import runpy

import pytest

from tests.integrations.test_trainer_examples import ROOT

# The last number of the line that shows what was learned, and what it must be compared with.
SHOWS = {
    "reversible_ode": (r"largest error of the learned force between -2 and 2: ([\d.]+)", lambda error: error < 0.5),
    "reversible_gnn": (r"update 40: .* accuracy on other nodes ([\d.]+)", lambda accuracy: accuracy > 0.5),
    "reversible_mamba": (r"update 300: .* letters right ([\d.]+)", lambda share: share > 0.5),
}
"""Line of the output, and the check of its last number. Chance is 0.25 and 0.17; an unknown force is off by 1."""


@pytest.mark.parametrize("name", SHOWS)
def test_script_says_how_it_is_run_and_is_in_the_docs(name):
    source = (ROOT / "examples" / f"{name}.py").read_text()
    assert f"# Run: python examples/{name}.py\n" in source
    assert max(map(len, source.splitlines())) <= 120
    assert f"examples/{name}.py" in (ROOT / "docs" / "examples.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWS)
def test_network_learns_in_flat_memory(name, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    output = capsys.readouterr().out
    pattern, is_learned = SHOWS[name]
    assert is_learned(float(re.search(pattern, output).group(1)))
    rows = re.findall(r"([\d,]+) bytes reversed, ([\d,]+) stored", output)
    (few, few_stored), (many, many_stored) = [[int(number.replace(",", "")) for number in row] for row in rows]
    assert few == many
    assert many_stored > 5 * few_stored
