"""Renders HTML pages from Jinja templates, with tables and figures, and writes them with the figures as SVG files."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pilot_jax.files import atomic_write
from pilot_jax.report.drawing import Figure, Key, marker_path, standalone
from pilot_jax.words import decimal as decimal  # what fills the cells of most tables


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts; the templates escape them for HTML."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    groups: Sequence[int] = ()  # of each row; where a slider shows one group at a time, only that group's rows show
    left_out: str = ""  # what the table does not have, as a sentence


@dataclasses.dataclass(frozen=True)
class Heat:
    """A table of numbers whose cells are the darker the larger they are; it needs no other table."""

    corner: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]
    digits: int = 2


@dataclasses.dataclass(frozen=True)
class Card:
    """A figure with its title, a sentence about it, its description for screen readers, and a table of its numbers."""

    name: str  # name of the SVG file
    title: str
    alt: str
    figure: Figure | None = None
    heat: Heat | None = None
    about: str = ""
    table: Table | None = None
    phases: Sequence[str] = ()  # labels of the slider
    data: Any = None  # JSON for the page's script


@dataclasses.dataclass(frozen=True)
class Page:
    """The HTML of a page, and its figures as SVG files by name."""

    html: str
    svgs: dict[str, str]


def _marker(key: Key) -> Markup:
    """Returns a legend's marker as a small SVG."""
    path = marker_path(key.marker, 7, 7, class_=f"mark c{key.colour}")
    return Markup(f'<svg class="key" viewBox="0 0 14 14" aria-hidden="true">{path}</svg>')


def _json(value: Any) -> Markup:
    """Returns JSON that can stand in a script element."""
    return Markup(json.dumps(value).replace("<", "\\u003c"))


@cache
def _environment() -> Environment:
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"marker": _marker, "json": _json, "decimal": decimal}
    return environment


def render(template: str, figures: Iterable[Card], **values: Any) -> Page:
    """Returns the page of a template filled with `values`; `figures` are all cards of the page."""
    html = _environment().get_template(template).render(**values)
    return Page(html, {card.name: standalone(card.figure) for card in figures if card.figure is not None})


def write_page(out: Path, page: Page) -> list[Path]:
    """Writes the page to `out` and its figures into the folder `out` without its suffix.

    Returns the files that were written, the page first.

    Raises:
        OSError: a file could not be written.
    """
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / f"{name}.svg": text for name, text in page.svgs.items()}
    for file, text in files.items():
        atomic_write(file, text)
    atomic_write(out, page.html)
    return [out, *files]
