import pytest

from tests.models.hub_server import serve
from tests.training.samples import write_images


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def test_commands_take_a_name_on_the_hub(hub, revnet, run_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output, errors = revnet("push", run_dir, "owner/digits", "--private")
    assert (code, errors) == (0, "")
    assert output.startswith("pushed  http://127.0.0.1:")
    assert hub.private == {"owner/digits": True}

    code, output, errors = revnet("doctor", "hub:owner/digits", "--batch", "8")
    assert (code, errors) == (0, "")
    assert "hub:owner/digits" in output

    code, output, errors = revnet("evaluate", "hub:owner/digits")
    assert code == 0
    assert "revnet38, hub:owner/digits (commit " in output
    # Not into the cache of downloads.
    assert (tmp_path / "evaluation_digits.json").is_file()

    write_images(tmp_path / "images", 1)
    code, output, errors = revnet("predict", "hub:owner/digits", "images", "--top", "1")
    assert code == 0
    assert errors.startswith("weights: hub:owner/digits (commit ")
    assert output.startswith("images/0_0.png")


def test_dry_run_writes_a_folder_and_sends_nothing(hub, revnet, run_dir, tmp_path):
    folder = tmp_path / "dry"
    code, output, errors = revnet("push", run_dir, "owner/digits", "--dry-run", folder)
    assert (code, errors, hub.requests) == (0, "", [])
    names = ["README.md", "config.json", "model.safetensors", "preprocess.safetensors"]
    *written, last = output.splitlines()
    assert [line.split()[1] for line in written] == [str(folder / name) for name in names]
    assert revnet("push", run_dir, "owner/digits", "--dry-run", folder)[0] == 0  # replaces its own files
    assert last == f"nothing was sent; `revnet push {folder} owner/digits` sends the folder"


def test_mistakes_are_one_line(hub, assert_refused, run_dir, tmp_path):
    assert_refused(["evaluate", "hub:owner/none"], "it is not a folder here, and not a model on the Hugging Face hub")
    assert_refused(["push", run_dir, "a b"], "`REPO_ID` (='a b') must be a name on the Hugging Face hub")
    assert_refused(["push", tmp_path / "nowhere", "owner/name"], "does not exist; pass a `.safetensors`")
    assert_refused(["push", run_dir], "`REPO_ID` is missing")
    assert_refused(["push", "", "owner/name"], "`CHECKPOINT` (='') must not be empty")


def test_refuses_in_one_line_without_the_network(hub, assert_refused, run_dir, tmp_path):
    assert_refused(["push", run_dir, "digits"], "`REPO_ID` (='digits') must be owner/name; put the owner before it.")
    (tmp_path / "config.json").write_text("{}")
    assert_refused(
        ["push", run_dir, "owner/digits", "--dry-run", tmp_path],
        f"`--dry-run` (='{tmp_path}') holds another `config.json`, which would be replaced; pass a new folder.",
    )
    assert (tmp_path / "config.json").read_text() == "{}"
    assert hub.requests == []
