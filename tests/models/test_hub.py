import pytest
import torch
from huggingface_hub import constants

from revnet import CheckpointError, MissingDependencyError
from revnet.models import RevNet, from_pretrained
from tests.models.hub_server import serve


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with serve(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def tiny():
    return RevNet(num_blocks=(1,), widths=(4, 4), num_classes=3).eval()


def test_a_network_travels_over_the_hub(hub):
    model, x = tiny(), torch.rand(1, 3, 8, 8)
    address = model.push_to_hub("owner/tiny", private=True)
    assert address.startswith(constants.ENDPOINT)
    assert hub.private == {"owner/tiny": True}
    assert set(hub.repositories["owner/tiny"]["main"]) == {"README.md", "config.json", "model.safetensors"}
    assert b'from_pretrained("owner/tiny")' in hub.repositories["owner/tiny"]["main"]["README.md"]
    assert torch.equal(RevNet.from_pretrained("owner/tiny")(x), model(x))
    # The weights come from the commit of the configuration.
    commit = hub.commit_of("owner/tiny", "main")
    assert f"GET /owner/tiny/resolve/{commit}/model.safetensors" in hub.requests

    other = tiny()
    other.push_to_hub("owner/tiny", branch="other", commit_message="Push another")
    assert torch.equal(from_pretrained("hub:owner/tiny@other")(x), other(x))
    assert torch.equal(from_pretrained("owner/tiny", revision="other")(x), other(x))
    assert torch.equal(from_pretrained("owner/tiny")(x), model(x))
    with pytest.raises(ValueError, match=r"`revision` \(='main'\) differs from the one in 'owner/tiny@other'"):
        from_pretrained("owner/tiny@other", revision="main")


def test_uses_the_cache_offline(hub, monkeypatch):
    model, x = tiny(), torch.rand(1, 3, 8, 8)
    model.push_to_hub("owner/tiny")
    from_pretrained("owner/tiny")
    hub.requests.clear()
    assert torch.equal(from_pretrained("owner/tiny", local_files_only=True)(x), model(x))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(from_pretrained("owner/tiny")(x), model(x))
    with pytest.raises(CheckpointError, match=r"'owner/none' cannot be loaded: it is not in the cache, and .* forbids"):
        from_pretrained("owner/none")
    with pytest.raises(CheckpointError, match=r"'owner/tiny' cannot be pushed: HF_HUB_OFFLINE is set; unset it"):
        model.push_to_hub("owner/tiny")
    assert hub.requests == []


def test_uses_the_cache_without_a_network(hub, monkeypatch):
    model, x = tiny(), torch.rand(1, 3, 8, 8)
    model.push_to_hub("owner/tiny")
    from_pretrained("owner/tiny")
    nowhere = "http://127.0.0.1:9"  # a port on which nothing listens
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    template = nowhere + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    assert torch.equal(from_pretrained("owner/tiny")(x), model(x))
    with pytest.raises(CheckpointError, match=r"it is not in the cache, and http://127.0.0.1:9 cannot be reached"):
        from_pretrained("owner/none")
    with pytest.raises(CheckpointError, match=r"cannot be loaded: http://127.0.0.1:9 cannot be reached \(.*refused\)"):
        from_pretrained("owner/tiny", force_download=True)
    with pytest.raises(CheckpointError, match=r"cannot be pushed: .* cannot be reached .* or write the files to a"):
        model.push_to_hub("owner/tiny")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "owner/none",
            {},
            r"'owner/none' cannot be loaded: it is not a folder here, and not a model .* check the name",
        ),
        ("owner/gated", {}, r"it is gated; accept its terms at http.*/owner/gated, and log in"),
        (
            "owner/empty",
            {},
            r"'owner/empty' on the Hugging Face hub has no config.json, so it is not a model of revnet",
        ),
        ("owner/pickled", {}, r"has no model.safetensors; revnet reads no other format of weights"),
        ("owner/empty", {"revision": "old"}, r"it has no revision 'old' on the Hugging Face hub; pass a branch"),
        (
            "a b",
            {},
            r"'a b' is neither a path that exists nor a name on the Hugging Face hub; pass the folder of a run",
        ),
        ("hub:a/b/c", {}, r"'a/b/c' is neither a path that exists nor a name"),
    ],
)
def test_says_in_one_line_why_a_name_cannot_be_loaded(hub, name, options, message):
    hub.gated.add("owner/gated")
    hub.repositories |= {
        "owner/gated": {"main": {"config.json": b"{}"}},
        "owner/empty": {"main": {"x.bin": b""}},
        "owner/pickled": {"main": {"config.json": b"{}", "pytorch_model.bin": b""}},
    }
    with pytest.raises(CheckpointError, match=message) as caught:
        from_pretrained(name, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a b", "x/y/z", "", 3])
def test_rejects_a_name_that_cannot_be_on_the_hub(hub, name):
    with pytest.raises(
        ValueError, match=r"`repo_id` \(=.*\) must be a name on the Hugging Face hub, such as owner/name"
    ):
        tiny().push_to_hub(name)
    assert hub.requests == []


def test_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(
        MissingDependencyError, match=r"the model `owner/name` needs huggingface_hub.* run `pip install"
    ):
        from_pretrained("owner/name")
