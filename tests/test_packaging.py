"""What is built for the package index, and what a release refuses."""

import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import revnet

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REPOSITORY = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"]


def build_module():
    pytest.importorskip("hatchling", reason="hatchling is installed only where a wheel is built")
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_link_of_the_built_readme_leads_to_a_file():
    build = build_module()
    readme = build.with_absolute_links((ROOT / "README.md").read_text(), REPOSITORY, revnet.__version__)
    links = re.findall(r"!?\[[^\]]*\]\(([^)\s]+)\)", readme)
    base = re.compile(rf"{re.escape(REPOSITORY)}/(?:raw|blob)/v{re.escape(revnet.__version__)}/(?P<path>[^#]+)")
    ours = [link for link in links if link.startswith(REPOSITORY)]
    assert len(ours) >= 5
    for link in links:
        assert link.startswith(("https://", "http://", "#")), link
    for link in ours:
        assert (ROOT / base.fullmatch(link.split("#")[0])["path"]).exists(), link
    assert re.search(r"!\[[^\]]*\]\([^)]*/raw/", readme), "the picture must be the file itself"


def test_the_metadata_name_the_repository_in_one_place():
    build = build_module()
    metadata = {}
    build.ReadmeAndUrls(str(ROOT), {"repository": "https://example.org/r"}).update(metadata)
    assert metadata["urls"]["Repository"] == "https://example.org/r"
    assert all(url.startswith("https://example.org/r") for url in metadata["urls"].values())
    assert "https://example.org/r/blob/" in metadata["readme"]["text"]
    assert (ROOT / "pyproject.toml").read_text().count(REPOSITORY) == 1


def test_a_release_needs_a_public_address_and_one_version_everywhere(tmp_path):
    result = subprocess.run([ROOT / "scripts" / "release", "9.9.9"], capture_output=True, text=True)
    assert result.returncode == 2
    expected = "placeholder" if "/OWNER/" in REPOSITORY else "is not 9.9.9"
    assert expected in result.stderr
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, re.MULTILINE)[1] == revnet.__version__
