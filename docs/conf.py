# SPDX-License-Identifier: BSD-3-Clause
"""The site: `make docs` builds it, strictly, into build/docs/html."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "ext"), str(HERE.parent)]  # our extensions; tools.reference

from masked_loss_ext import __version__  # noqa: E402

project = "masked_loss_ext"
author = copyright = "the authors of masked_loss_ext"
release = version = __version__

extensions = ["myst_parser", "sphinx_copybutton", "mathml", "names"]
exclude_patterns = ["ext", "static", "requirements.txt"]
nitpicky = True
suppress_warnings = ["config.cache"]  # reference_names is made anew each time

myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 4  # a link to a heading that is not there is an error
myst_fence_as_directive = []
html_math_renderer = "mathml"
python_maximum_signature_line_length = 72
add_function_parentheses = False
toc_object_entries = False
highlight_language = "python"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"masked_loss_ext {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_favicon = "static/mark.svg"
html_copy_source = html_show_sourcelink = False
html_show_sphinx = False
html_use_index = html_domain_indices = False  # the reference has one of its own
pygments_style, pygments_dark_style = "tango", "github-dark"
