"""Builds what the package index shows from the repository's address, which stands once, in `pyproject.toml`.

The README's relative links work in a checkout. On the package index they need the repository's address and a version.
A wheel also gets the recipes, which stand next to the sources; an editable install reads them there.
"""

import re
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<path>(?!https?://|#|mailto:)[^)\s]+)\)")


def with_absolute_links(readme: str, repository: str, version: str) -> str:
    """Return the README with each relative link pointing to the files of a tagged version."""

    def absolute(link: re.Match[str]) -> str:
        # Images must be the file itself rather than the page that shows it.
        kind = "raw" if link["image"] else "blob"
        return f"{link['image']}[{link['text']}]({repository}/{kind}/v{version}/{link['path']})"

    return RELATIVE_LINK.sub(absolute, readme)


class ReadmeAndUrls(MetadataHookInterface):
    """Sets `readme` and `urls`, which `[project]` lists as dynamic."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set both fields."""
        repository = self.config["repository"]
        readme = Path(self.root, "README.md").read_text(encoding="utf-8")
        source = Path(self.root, "src", "revnet", "__init__.py").read_text(encoding="utf-8")
        version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)[1]
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": with_absolute_links(readme, repository, version),
        }
        metadata["urls"] = {
            "Repository": repository,
            "Issues": f"{repository}/issues",
            "Changelog": f"{repository}/blob/v{version}/CHANGELOG.md",
        }


class Recipes(BuildHookInterface[Any]):
    """Puts the folder `configs` into the package."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the folder, unless the install is editable: a folder of this name would be a package without code."""
        if version != "editable":
            build_data["force_include"][str(Path(self.root, "configs"))] = "revnet/configs"
