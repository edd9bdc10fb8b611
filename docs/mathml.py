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


def on_page_content(content: str, **_: Any) -> str:
    """Returns the page's HTML with MathML in place of LaTeX."""
    content = BLOCK.sub(
        lambda m: f'<div class="formula">{convert(html.unescape(m[1]), display="block")}</div>', content)
    return INLINE.sub(lambda m: convert(html.unescape(m[1])), content)
