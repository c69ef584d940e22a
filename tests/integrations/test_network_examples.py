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


CONVERSIONS = ("convert_resnet", "convert_vit", "convert_gpt")


@pytest.mark.parametrize("name", [*SHOWS, *CONVERSIONS])
def test_script_says_how_it_is_run_and_is_in_the_docs(name):
    source = (ROOT / "examples" / f"{name}.py").read_text()
    assert f"# Run: python examples/{name}.py" in source
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


def main_of(name):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]


def activations(output):
    """Return the two numbers of bytes that a script prints."""
    (line,) = re.findall(r"activations of a step: ([\d,]+) bytes \w+, ([\d,]+) \w+", output)
    return [int(number.replace(",", "")) for number in line]


def test_converts_a_vision_transformer_and_back(capsys):
    pytest.importorskip("timm")
    main_of("convert_vit")(num_updates=2)
    output = capsys.readouterr().out
    before, after = activations(output)
    assert before > 3 * after
    # 11 rounded sums of at most half a step each, amplified by the functions.
    assert float(re.search(r"largest difference of the logits: (\S+)", output).group(1)) < 100 * 11 * 2.0**-15


def test_converts_a_residual_network(capsys):
    pytest.importorskip("timm")
    datasets = pytest.importorskip("datasets")
    folder = ROOT.parent / "shared" / "data" / "cifar10"
    if not folder.is_dir():
        pytest.skip("needs the Parquet files of CIFAR-10")
    datasets.disable_progress_bars()
    main_of("convert_resnet")([str(folder), "--random-weights", "--num-updates", "2", "--batch-size", "8"])
    output = capsys.readouterr().out
    assert "converted 12 of 16 blocks" in output
    before, after = activations(output)
    assert before > after


def test_converts_a_language_model(capsys, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model = tokenizers.models.BPE({letter: number for number, letter in enumerate(sorted(alphabet))}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path)
    config = transformers.GPT2Config(vocab_size=256, n_positions=64, n_embd=16, n_layer=6, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("A language model reads this sentence. " * 40)
    main_of("convert_gpt")([str(text), "--model", str(tmp_path), "--num-updates", "4", "--length", "32"])
    output = capsys.readouterr().out
    before, after = re.search(r"loss before and after the conversion: (\S+), (\S+)", output).groups()
    assert before == after
    assert "Dr2Net(alpha=0.75, beta=0.25" in output
    is_reversed, is_stored = activations(output)
    assert is_stored > 2 * is_reversed
