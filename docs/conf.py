"""How Sphinx builds these pages; `make docs` treats each of its warnings as an error."""

from __future__ import annotations

from importlib.metadata import version as installed_version

project = "external_oms"
author = "the external_oms contributors"
release = version = installed_version("openfeature-provider-external-oms")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]

default_role = "code"  # docstrings write `names` with single backticks

html_theme = "furo"
html_title = f"external_oms {release}"
html_copy_source = False
html_show_copyright = False

myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
