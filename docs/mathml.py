"""A hook of mkdocs that turns the formulas of a page, LaTeX between dollar signs, into MathML, which browsers show.

`pymdownx.arithmatex` finds the formulas (`$…$` in a line, `$$…$$` as a paragraph); no script and no font is loaded.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)


BAR = "<mo>&#x02016;</mo>"  # of a norm; without attributes, browsers stretch only the left one of a pair


def mathml(latex: str, display: str) -> str:
    """Returns a formula, as it stands in HTML, as MathML."""
    return convert(html.unescape(latex), display=display).replace(BAR, BAR.replace("<mo>", '<mo stretchy="false">'))


def on_page_content(content: str, **_: Any) -> str:
    """Returns the page's HTML with MathML in place of LaTeX."""
    content = BLOCK.sub(lambda found: f'<div class="formula">{mathml(found[1], "block")}</div>', content)
    return INLINE.sub(lambda found: mathml(found[1], "inline"), content)
