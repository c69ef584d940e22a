"""Sphinx settings: Markdown pages, notebooks, and an API reference from the docstrings."""

from importlib.metadata import version as installed_version
from importlib.util import find_spec

project = "revnet"
release = version = installed_version("revnet")
copyright = "the revnet authors"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"revnet {version}"
html_static_path = ["_static"]
html_css_files = ["revnet.css"]
exclude_patterns = ["_build", "jupyter_execute", "**.ipynb_checkpoints"]  # the second one is made by a build
myst_heading_anchors = 3
# Pages show the output that is stored in the notebooks; `scripts/tutorials` runs them.
nb_execution_mode = "off"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
# Building the documentation needs neither of them.
autodoc_mock_imports = [name for name in ("timm", "transformers") if find_spec(name) is None]
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Sections of our docstrings that Google's style does not know.
napoleon_custom_sections = ["Shape", "Numerics"]
# Docstrings write `code` with single backticks, as Markdown does.
default_role = "code"
