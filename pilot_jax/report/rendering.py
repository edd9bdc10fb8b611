"""Renders HTML pages from Jinja templates, with tables and figures, and writes them with the figures as PNG files."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pilot_jax.files import atomic_write
from pilot_jax.report import charts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def decimal(value: float | None, digits: int = 3) -> str:
    """Returns a number with the given number of decimals; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts; the templates escape them for HTML."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Card:
    """A figure with its title and perhaps a table of its numbers."""

    name: str  # name of the PNG file
    title: str
    svg: Markup
    png: bytes
    table: Table | None = None


@dataclasses.dataclass(frozen=True)
class Page:
    """The HTML of a page, and its figures as PNG files by name."""

    html: str
    pngs: dict[str, bytes]


def figure_card(name: str, title: str, alt: str, figure: Figure, table: Table | None = None) -> Card:
    """Returns a card with the figure, and closes the figure; `alt` describes it for screen readers."""
    card = Card(name, title, Markup(charts.svg(figure, name, alt)), charts.png(figure), table)
    charts.pyplot().close(figure)
    return card


@cache
def _environment() -> Environment:
    return Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
                       undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def render(template: str, figures: Iterable[Card], **values: Any) -> Page:
    """Returns the page of a template filled with `values`; `figures` are all cards of the page."""
    html = _environment().get_template(template).render(**values)
    return Page(html, {card.name: card.png for card in figures})


def write_page(out: Path, page: Page) -> list[Path]:
    """Writes the page to `out` and its figures into the folder `out` without its suffix.

    Returns the files that were written, the page first.

    Raises:
        OSError: a file could not be written.
    """
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"{name}.png": data for name, data in page.pngs.items()}
    for file, data in files.items():
        atomic_write(file, data)
    atomic_write(out, page.html)
    return [out, *files]
