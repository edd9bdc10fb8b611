"""Draws inline SVG: a canvas, scales and ticks, the marks of series, and a figure at two widths.

A figure is drawn twice, for narrow and for wide places, and the page shows the one that fits. So no text becomes small
on a phone. Colours are classes, `c0` to `c7`, which the page's style defines for light, dark and print.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Sequence
from typing import Any

NARROW, WIDE = 320, 540  # widths in px: a phone's, and half of a desktop page
COLOURS = 8
LETTER = 7.0  # px that a letter of 12 px takes at most, on average over a word
# Values of the style's variables, for figures in files of their own.
LIGHT = ("#2368c4", "#c2501a", "#0d7f57", "#8f45bd", "#8f6a00", "#c22f6c", "#2f7479", "#666666")


@dataclasses.dataclass(frozen=True)
class Key:
    """An entry of a legend: a series, its colour and its marker, both by number."""

    name: str
    colour: int
    marker: int = 0


@dataclasses.dataclass(frozen=True)
class Figure:
    """A drawing at two widths, with its legend; an empty legend has nothing to switch off."""

    narrow: str
    wide: str
    legend: tuple[Key, ...] = ()


def figure(draw: Callable[[int], Canvas], legend: Sequence[Key] = ()) -> Figure:
    """Returns the figure that a function of the width in px draws."""
    return Figure(draw(NARROW).svg("narrow"), draw(WIDE).svg("wide"), tuple(legend))


def standalone(drawn: Figure) -> str:
    """Returns the wide drawing as an SVG file with its style and legend."""
    colours = "".join(f".c{i}{{--c:{colour}}}" for i, colour in enumerate(LIGHT))
    height = 24 if drawn.legend else 0
    keys, x = "", 8.0
    for key in drawn.legend:
        keys += f'<g class="c{key.colour}">{marker_path(key.marker, x, 12)}<text x="{x + 10}" y="16">' \
                f"{html.escape(key.name)}</text></g>"
        x += 30 + text_width(key.name)
    old_width, old_height = (float(v) for v in drawn.wide.split('viewBox="0 0 ')[1].split('"')[0].split())
    width = max(old_width, x)
    inner = drawn.wide[drawn.wide.index(">") + 1:-len("</svg>")]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {old_height + height:g}" '
            f'width="{width:g}" height="{old_height + height:g}"><style>{colours}{SVG_STYLE}'
            'svg{--ink:#1b1f24;--soft:#555;--line:#ccc;--good:#0d7448;--bad:#b3261e;background:#fff;font-family:system-ui,sans-serif}</style>'
            f'{keys}<g transform="translate(0 {height})">{inner}</g></svg>\n')


SVG_STYLE = (
    "text{font-size:12px;fill:var(--ink)}text.soft{fill:var(--soft)}text.strong{font-weight:600}"
    ".grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}"
    ".mark{fill:var(--c);stroke:var(--card,#fff);stroke-width:1}.hollow{fill:var(--card,#fff);stroke:var(--c);"
    "stroke-width:2}.line{fill:none;stroke:var(--c);stroke-width:2}.thin{stroke-width:1;opacity:.55}"
    ".bar{fill:var(--c)}.range{stroke:var(--c);stroke-width:2}.join{stroke-width:4;opacity:.45}"
    "line.up{stroke:var(--good)}line.down{stroke:var(--bad)}text.up{fill:var(--good)}text.down{fill:var(--bad)}")


def text_width(text: str) -> float:
    """Returns the px that a text of 12 px takes at most, as nearly as can be known without its font."""
    return LETTER * len(text)


def shortened(text: str, room: float) -> str:
    """Returns a text, with an ellipsis in its middle if it is wider than `room` px."""
    most = max(4, int(room / LETTER))
    if len(text) <= most:
        return text
    return f"{text[:(most - 1) // 2]}…{text[len(text) - most // 2:]}"


def marker_path(kind: int, x: float, y: float, **attributes: Any) -> str:
    """Returns the marker number `kind` at (x, y): circle, square, triangle, diamond, or one of these turned."""
    r = 4.5
    given = "".join(f' {name.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
                    for name, value in ({"class_": "mark"} | attributes).items())
    shapes = [f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
              f"M{x - 4:.1f} {y - 4:.1f}h8v8h-8z", f"M{x:.1f} {y - 5.5:.1f}l5.5 9.5h-11z",
              f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z", f"M{x:.1f} {y + 5.5:.1f}l5.5 -9.5h-11z",
              f"M{x - 2:.1f} {y - 6:.1f}h4v4h4v4h-4v4h-4v-4h-4v-4h4z", f"M{x - 1.5:.1f} {y - 7:.1f}h3v14h-3z",
              f"M{x - 6:.1f} {y - 2:.1f}h12v4h-12z"]
    return f'<path d="{shapes[kind % len(shapes)]}"{given}/>'


class Canvas:
    """Collects the elements of an SVG of the given size in px."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._elements: list[str] = []

    def add(self, tag: str, content: str | None = None, **attributes: Any) -> None:
        """Adds an element; an attribute's trailing underscore is dropped, and others become hyphens."""
        text = "".join(f' {name.rstrip("_").replace("_", "-")}="{_short(value)}"' for name, value in attributes.items()
                       if value is not None)
        self._elements.append(f"<{tag}{text}/>" if content is None else f"<{tag}{text}>{html.escape(content)}</{tag}>")

    def text(self, x: float, y: float, text: str, anchor: str = "start", **attributes: Any) -> None:
        """Adds a text; `y` is the height of its middle."""
        self.add("text", text, x=x, y=y + 4, text_anchor=None if anchor == "start" else anchor, **attributes)

    def line(self, x0: float, y0: float, x1: float, y1: float, class_: str, **attributes: Any) -> None:
        """Adds a line."""
        self.add("line", x1=x0, y1=y0, x2=x1, y2=y1, class_=class_, **attributes)

    def marker(self, kind: int, x: float, y: float, **attributes: Any) -> None:
        """Adds the marker number `kind`."""
        self._elements.append(marker_path(kind, x, y, **attributes))

    def raw(self, element: str) -> None:
        """Adds an element that is SVG already."""
        self._elements.append(element)

    def svg(self, class_: str) -> str:
        """Returns the whole as an `<svg>` element."""
        return (f'<svg class="{class_}" viewBox="0 0 {self.width:g} {self.height:g}" aria-hidden="true" '
                f'focusable="false">{"".join(self._elements)}</svg>')


def _short(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else html.escape(str(value))


@dataclasses.dataclass(frozen=True)
class Scale:
    """A linear map from numbers, low to high, to px, first to last."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        """Returns the px of a number."""
        share = 0.5 if self.high == self.low else (value - self.low) / (self.high - self.low)
        return self.first + share * (self.last - self.first)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Returns at most `most` round numbers at equal steps within [low, high]; at least the middle of a tiny range."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    for factor in (1, 2, 2.5, 5, 10, 20):
        step = factor * power
        first = math.ceil(low / step - 1e-9)
        count = math.floor(high / step + 1e-9) - first + 1
        if count <= most:
            break
    return [round((first + i) * step, 12) + 0.0 for i in range(count)] or [(low + high) / 2]


def span(values: Sequence[float], around: Sequence[float] = ()) -> tuple[float, float]:
    """Returns the range of finite values and of the numbers `around`, with a little room on both sides."""
    finite = [v for v in (*values, *around) if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    room = 0.04 * (high - low) or max(abs(high) * 0.1, 0.05)
    return low - room, high + room


def axis_labels(values: Sequence[float]) -> list[str]:
    """Returns numbers as texts with equally many decimals, as few as tell them apart."""
    for digits in range(8):
        texts = [f"{v:,.{digits}f}" for v in values]
        if all(abs(float(t.replace(",", "")) - v) < 1e-9 + 1e-6 * abs(v) for t, v in zip(texts, values, strict=True)):
            return texts
    return [f"{v:.3g}" for v in values]
