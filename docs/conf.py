"""Configuration of the documentation site; `make docs` builds it."""

import importlib.metadata
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from docs.building.captions import setup_captions  # noqa: E402
from docs.building.docstrings import setup_docstrings  # noqa: E402
from docs.building.generate import write_pages  # noqa: E402
from docs.building.mathml import setup_math  # noqa: E402

project = "mergebound"
author = "The mergebound developers"
copyright = "the mergebound developers, Apache-2.0"
version = release = importlib.metadata.version("mergebound")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_gallery.gen_gallery"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
exclude_patterns = ["building", "gallery/README.rst"]
templates_path: list[str] = []
nitpicky = False
smartquotes = False  # options such as --out stay as they are typed

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
html_math_renderer = "mathml"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

sphinx_gallery_conf = {
    "examples_dirs": ["gallery"],
    "gallery_dirs": ["generated/gallery"],
    "filename_pattern": r"/plot_",
    "abort_on_example_error": True,  # a script that fails, or whose claim does not hold, ends the build
    "run_stale_examples": True,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_memory": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "backreferences_dir": None,
    "nested_sections": False,
}

html_theme = "furo"
html_title = "mergebound"
html_static_path = ["building/static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False


def setup(app: object) -> None:
    """Formulas, names of files, docstrings as they are written, and the pages that are made from the code."""
    setup_math(app)
    setup_captions(app)
    setup_docstrings(app)
    write_pages(ROOT / "docs" / "generated")
