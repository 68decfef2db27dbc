"""The site. From the root of the repository, whose relative links are then those of the site:

python -m sphinx -W -c docs . docs/_build/site      # and `python docs/_ext/check.py docs/_build/site`
python -m sphinx -b linkcheck -c docs . docs/_build/links      # links to others' sites; needs the network
"""

import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

import lightning_ep  # noqa: E402

project = "lightning_ep"
release = version = lightning_ep.__version__
html_title = f"lightning_ep {version}"
copyright = "the authors of lightning_ep"

extensions = [
    "commands",  # of docs/_ext
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
default_role = "py:obj"  # single backticks in docstrings are names
root_doc = "docs/index"
include_patterns = ["docs/**", "benchmarks/results/*.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [".*", "docs/_*", "runs", "exports", "tests", "lightning_ep", "lightning_logs"]

myst_enable_extensions = ["attrs_block", "colon_fence"]
myst_heading_anchors = 4

autodoc_inherit_docstrings = False  # what Lightning says of its hooks is in its own reference
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
autosummary_generate = False
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#5b2a86", "color-brand-content": "#5b2a86"},
    "dark_css_variables": {"color-brand-primary": "#c4a1e8", "color-brand-content": "#c4a1e8"},
}
copybutton_exclude = ".linenos, .gp"


def setup(app: Sphinx) -> None:
    """Leaves private classes out of what a class is said to be based on."""
    app.connect("autodoc-process-bases", _hide_private_bases)


def _hide_private_bases(app: Sphinx, name: str, obj: type, options: object, bases: list[type]) -> None:
    bases[:] = [base for base in bases if not base.__name__.startswith("_")] or [object]
