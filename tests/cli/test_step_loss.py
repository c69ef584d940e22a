"""`--loss` of `revnet memory` and `revnet plan`."""

import pytest

NETWORKS = """
from revnet.models import ReversibleTransformer

def language_model():
    return ReversibleTransformer(vocab_size=500, dim=16, depth=1, num_heads=2)
"""
TOKENS = ["--input-shape", "[32]", "--input-dtype", "int64", "--batch", "4"]


@pytest.fixture(autouse=True)
def _networks(tmp_path, monkeypatch):
    (tmp_path / "step_loss_networks.py").write_text(NETWORKS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def peak_line(output):
    return next(line for line in output.splitlines() if line.startswith("peak"))


def test_memory_counts_the_loss(revnet):
    model = "step_loss_networks:language_model"
    peaks = []
    for loss in ("cross-entropy", "chunked"):
        code, output, _ = revnet("memory", model, *TOKENS, "--loss", loss, "--depth", "0", "--measure")
        assert code == 0
        words = peak_line(output).split()
        assert f"the predicted peak is {words[1]} {words[2].rstrip(',')}" in output
        assert ("chunked cross-entropy" in output) == (loss == "chunked")
        peaks.append(float(words[1]) * {"KiB": 1, "MiB": 1024}[words[2].rstrip(",")])
    assert peaks[1] < peaks[0] / 2


def test_plan_chooses_chunks(revnet):
    model = "step_loss_networks:language_model"
    code, output, _ = revnet("plan", model, *TOKENS, "--loss", "cross-entropy", "--budget", "600KiB")
    assert code == 0
    assert "chunked    its logits exist for some rows at a time" in output
    assert 'kwargs={"targets": targets}' in output
    assert 'chunked_loss="auto").apply(model)' in output


@pytest.mark.slow  # tests/memory/planning/test_chunked_loss.py has it, too
def test_largest_batch(revnet):
    model = "step_loss_networks:language_model"
    code, output, _ = revnet("plan", model, *TOKENS, "--loss", "chunked", "--budget", "600KiB", "--largest", "batch")
    assert code == 0
    assert "chunked cross-entropy" in output
    assert output.rstrip().endswith("--loss chunked")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["revnet38", "--loss", "chunked"], "is for models of your own that read tokens"),
        (["step_loss_networks:language_model", "--batch", "2", "--loss", "chunked"], "is for models of your own that"),
        (["torch.nn:Identity", *TOKENS, "--loss", "chunked"], "needs a model that takes `targets`"),
        (
            ["step_loss_networks:language_model", *TOKENS, "--loss", "chunked", "--devices", "2", "--strategy", "ddp"],
            "is for one device; leave it out with `--devices`",
        ),
        (
            ["step_loss_networks:language_model", *TOKENS, "--loss", "chunked", "--largest", "patch"],
            "goes with `--largest batch` only",
        ),
    ],
)
def test_rejects_other_steps(assert_refused, arguments, message):
    assert_refused(["plan", *arguments, "--budget", "1GiB"], message)
