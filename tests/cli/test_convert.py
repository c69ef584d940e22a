import sys

import pytest
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        layers = [layer for _ in range(3) for layer in (nn.Tanh(), nn.Conv2d(dim, dim, 3, padding=1))]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


class Network(nn.Module):
    """A small network, which `revnet convert` imports from this file."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*[Block() for _ in range(12)])

    def forward(self, x):
        return self.body(self.stem(x))


OWN = "tests.cli.test_convert:Network"


@pytest.mark.parametrize("method", ["consistent", "bdia", "dr2net", "rewire"])
def test_reports_blocks_bytes_and_code(revnet, method):
    code, output, errors = revnet("convert", OWN, "--blocks", "body", "--method", method, "--image", 8, "--batch", 2)
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert lines[0].startswith("converted 12 of 12 blocks by ")
    shown = [line.split()[1] for line in lines if line.startswith("  ")]
    original, *others = map(float, shown)
    assert original > 1.5 * max(others)
    error = float(next(line for line in lines if line.startswith("outputs")).split()[6].rstrip(","))
    assert error < (1e-3 if method == "bdia" else 10)  # 7 sums, each rounded to 2^-15, of numbers of about 1.
    # The printed code does what the command did.
    space = {}
    exec("\n".join(lines[lines.index("import revnet") :]), space)
    assert [type(block).__name__ for block in space["model"].body] == ["Block"] * 12
    assert sys.modules["tests.cli.test_convert"].Network is type(space["model"])


class Huge(Network):
    """Its streams leave the range of the grid."""

    def forward(self, x):
        return self.body(1e5 * self.stem(x))


class Tokens(nn.Module):
    """A network with 16 positions."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Embedding(16, 8)
        self.body = nn.Sequential(*[Residual() for _ in range(3)])

    def forward(self, tokens):
        return self.body(self.positions(torch.arange(tokens.shape[1])) + tokens[..., None])


class Residual(nn.Linear):
    def __init__(self):
        super().__init__(8, 8)

    def forward(self, x):
        return x + torch.tanh(super().forward(x))


class Padded(nn.Module):
    """A network whose outputs are 0 for tokens that are 0."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.large, self.small = nn.Embedding(16, 8, padding_idx=0), nn.Embedding(3, 8, padding_idx=0)
        self.body = nn.Sequential(*[Residual() for _ in range(3)])
        for block in self.body:
            nn.init.zeros_(block.bias)

    def forward(self, tokens):
        return self.body(self.large(tokens) + self.small(tokens))


def test_outputs_are_compared_for_random_tokens(revnet):
    options = ["--blocks", "body", "--input-dtype", "int64", "--batch", 2, "--input-shape", "[6]"]
    _, output, _ = revnet("convert", f"{__name__}:Padded", *options, "--precision", "bf16-mixed")
    (line,) = [line for line in output.splitlines() if line.startswith("outputs")]
    assert 0.01 < float(line.split()[6].rstrip(",")) < 1
    assert line.endswith("relative to the largest one (bf16-mixed)")

    from revnet.cli._try_conversion import _movement, _outputs

    model, tokens = Padded(), torch.arange(3)[None]
    (exact,), (mixed,), (zeros,) = (
        _outputs(model, (tokens * factor,), dtype) for factor, dtype in ((1, None), (1, torch.bfloat16), (0, None))
    )
    assert not torch.equal(exact, mixed)
    assert _movement([exact, zeros], [exact, zeros]) == "move by 0.0e+00, relative to the largest one"
    assert _movement([exact], [zeros]) == "move by inf, relative to the largest one"
    assert _movement([zeros], [zeros]) == "are all 0 for these inputs, so how far they move is unknown"


def test_a_model_that_cannot_be_trained_on_the_grid(revnet):
    code, _, errors = revnet("convert", f"{__name__}:Huge", "--blocks", "body", "--image", 8, "--batch", 2)
    assert code == 2
    assert errors.startswith("revnet convert: error: a stream reached ")
    assert errors.count("\n") == 1


def test_an_input_that_is_too_long(revnet):
    arguments = ["convert", f"{__name__}:Tokens", "--blocks", "body", "--input-dtype", "int64", "--batch", 2]
    assert revnet(*arguments, "--input-shape", "[16]")[0] == 0
    code, _, errors = revnet(*arguments, "--input-shape", "[17]")
    assert code == 2
    assert errors.endswith("index out of range in self; pass a shorter `--input-shape`\n")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet50", "--blocks", "layer1"], "`MODEL` (=resnet50) must be timm:NAME, torchvision:NAME, transformers"),
        ([OWN], f"`--blocks` must name the lists of blocks of {OWN}, which has body (12), body.0.layers (6)"),
        ([OWN, "--blocks", "stem"], "`--blocks` names 'stem', which is a Conv2d"),
        ([OWN, "--blocks", "body", "--size", "1"], "`--size` (=1.0) must be a finite number from 1/256"),
        ([OWN, "--blocks", "body", "--method", "bdia", "--fraction-bits", "0"], "`--fraction-bits` (=0) must be 1 or"),
        ([OWN, "--blocks", "body,body"], "`--blocks` names `body.0` twice; leave one of the lists out"),
        ([OWN, "--blocks", "body", "--pretrained"], "`--pretrained` is for models of other libraries"),
    ],
)
def test_bad_input(assert_refused, arguments, message):
    assert_refused(["convert", *arguments], message)


def test_a_model_of_another_library(revnet):
    pytest.importorskip("timm")
    code, output, _ = revnet("convert", "timm:resnet26", "--blocks", "layer1,layer2", "--image", 32, "--batch", 2)
    assert code == 0
    assert "left layer1.0 as it is" in output
    code, _, errors = revnet("convert", "timm:resnet2", "--blocks", "layer1")
    assert (code, errors) == (
        2,
        "revnet convert: error: `MODEL` (=timm:resnet2) cannot be built: Unknown model (resnet2)\n",
    )


def test_a_library_that_is_missing(revnet, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    message = "the model `timm:resnet50` needs timm, which is not installed; run `pip install timm`."
    assert revnet("convert", "timm:resnet50", "--blocks", "layer1") == (2, "", f"revnet convert: error: {message}\n")
