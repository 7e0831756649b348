"""Sphinx settings of the book. `make docs` builds it into build/docs."""

import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "extension")]

import lowrank_lab_book  # noqa: E402

import lowrank_lab  # noqa: E402

project = "lowrank_lab"
author = "The lowrank_lab developers"
copyright = "2026, the lowrank_lab developers"
version = release = lowrank_lab.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_click",
    "lowrank_lab_book",
]
autodoc_mock_imports = [n for n in ("lightning", "transformers") if find_spec(n) is None]
exclude_patterns = ["_static", "extension", "**/.ipynb_checkpoints"]
smartquotes = False  # --precision has two hyphens
default_role = "code"
nitpicky = True
nitpick_ignore_regex = lowrank_lab_book.OUTSIDE

# Markdown. The notebooks are executed before Sphinx runs (docs/chapters.py).
nb_execution_mode = "off"
nb_merge_streams = True
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
myst_enable_extensions = ["colon_fence", "dollarmath", "deflist", "fieldlist"]
myst_heading_anchors = 3
myst_dmath_double_inline = True
suppress_warnings = ["mystnb.unknown_mime_type"]

# API pages from docstrings in the Google style.
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# HTML that makes no request to any network.
html_theme = "sphinx_book_theme"
html_title = "lowrank_lab"
html_theme_options = {
    "home_page_in_toc": True,
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "search_bar_text": "Search the book",
    "navigation_with_keys": False,
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
}
mathjax = Path(next(iter(find_spec("sphinx-mathjax-offline").submodule_search_locations)))
html_static_path = ["_static", str(mathjax / "static" / "mathjax" / "tex-svg-full.js")]
mathjax_path = "tex-svg-full.js"
mathjax3_config = {"options": {"enableMenu": False}}
html_context = {"default_mode": "auto"}
html_css_files = ["book.css"]
html_show_search_summary = False  # it would fetch pages, which a browser refuses for file://
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
