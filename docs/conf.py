"""The manual's configuration: Sphinx reads it, `scripts/check` builds with it."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "sllm_actor"
author = "the sllm_actor authors"
version = release = installed_version("sllm_actor")
extensions = ["myst_parser", "sphinx.ext.autodoc", "from_code"]
exclude_patterns = ["benchmarks"]
source_suffix = {".md": "markdown"}
nitpicky = False

myst_heading_anchors = 4
# A dollar and a colon are what they are: commands have many of both.
myst_enable_extensions: list[str] = []

autodoc_typehints = "signature"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"sllm_actor {release}"
html_copy_source = False
html_show_sphinx = False
# Nothing is loaded from elsewhere when it is read: the theme's own files are all there is.
html_theme_options = {"navigation_with_keys": False}
