"""Sphinx settings of the site: ``make docs`` builds it into ``build/site``, without network.

The sources are the Markdown pages of the repository as they are, so every link works on the site and in the repository.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

ACCENT = re.compile(r"\\(?:hat|bar|tilde)\s*(?:\\?[A-Za-z]+|\{[^{}]*\})")
FUNCTION = re.compile(r"\\(?:ln|log|sin|cos)(?=\s+[\w\\])")
logger = logging.getLogger(__name__)

project = "compress"
author = "the compress contributors"
copyright = "the compress contributors, Apache-2.0"
extensions = ["myst_parser", "sphinx_copybutton"]
root_doc = "docs/index"
include_patterns = ["docs/**", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = ["docs/_static", ".venv", "build", "out"]
source_suffix = {".md": "markdown"}

myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4

nitpicky = True
highlight_language = "text"
html_theme = "furo"
html_title = "compress"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_use_index = False
html_copy_source = False
html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"

#: The table of contents. It stands here and not in index.md, which has to read well on GitHub too.
CONTENTS = """

```{toctree}
:hidden:
:caption: Use it

start
choose
recipes
passes/index
checkpoints
attention
Metrics <metrics>
commands
reference
```

```{toctree}
:hidden:
:caption: Understand it

tour
architecture
methods
Format <format>
benchmarks
reliability
decisions/index
```

```{toctree}
:hidden:
:caption: Extend it

../CONTRIBUTING
extend/pass
extend/family
extend/codec
extend/edit
extend/metric
../CHANGELOG
```
"""


def setup(app: Sphinx) -> None:
    """Register the table of contents and the renderer of formulas."""
    app.add_html_math_renderer("mathml", (_inline_math, None), (_display_math, None))
    app.connect("source-read", _add_contents)
    app.connect("build-finished", _add_entrance)


def _add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    if page == root_doc:
        source[0] += CONTENTS
    if page in ("docs/passes/index", "docs/decisions/index"):
        source[0] += "\n```{toctree}\n:hidden:\n:glob:\n\n*\n```\n"


def _add_entrance(app: Sphinx, error: Exception | None) -> None:
    """Let the folder of the site open at its first page."""
    redirect = f'<meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
    (Path(app.outdir) / "index.html").write_text(redirect, encoding="utf-8")


def _inline_math(translator: Any, node: nodes.math) -> None:
    translator.body.append(_mathml(node, as_block=False))
    raise nodes.SkipNode


def _display_math(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{_mathml(node, as_block=True)}</div>')
    raise nodes.SkipNode


def _mathml(node: nodes.Element, as_block: bool) -> str:
    """Return a formula as MathML, which browsers show without a script; warn where it cannot be read."""
    # docutils takes the index of an accented letter for a limit below it, and draws primes as apostrophes
    tex = ACCENT.sub(r"{\g<0>}", node.astext()).replace("'", r"^{\prime}")
    tex = FUNCTION.sub(r"\g<0>\,", tex)  # TeX puts a thin space after the name of a function
    try:
        # browsers draw `^` and `~` into the letter if they are marked as accents
        return str(tex2mathml(tex, as_block=as_block)).replace(' accent="true"', "")
    except MathError as error:
        logger.warning("formula %r: %s", node.astext(), error, location=node)
        return html.escape(node.astext())
