"""What the report's pages are made of: one HTML file each, which asks for nothing from anywhere."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pilot_jax.report import charts

STYLE = """
:root{color-scheme:light dark;--ground:#fbfaf8;--card:#fff;--ink:#1b1f24;--soft:#5b6470;--line:#dedbd5;--accent:#1f62b5}
@media (prefers-color-scheme:dark){:root{--ground:#14161a;--card:#1c1f25;--ink:#e8e6e1;--soft:#a2a9b4;--line:#343943;
--accent:#7db2ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:1.5rem;line-height:1.25;margin:.2em 0}h2{font-size:1.2rem;margin:2.2em 0 .6em}
h3{font-size:.95rem;margin:0 0 .5em}main>h3{margin-top:1.8em}p{margin:.3em 0}.soft{color:var(--soft)}
a{color:var(--accent)}:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.tiles,.cards{display:grid;gap:12px}
.tiles{grid-template-columns:repeat(auto-fit,minmax(140px,1fr));margin:14px 0}
.cards{grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));align-items:start}
.tile,.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px;min-width:0}
.tile b{display:block;font-size:1.15rem;white-space:nowrap;font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:.85rem}
.card svg{display:block;width:100%;height:auto;max-width:480px;color:var(--ink)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:3px 10px 3px 0;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{font-weight:600}
details{margin-top:8px}summary{cursor:pointer;color:var(--accent);font-size:.85rem}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font-size:.8rem}
.said{display:flex;gap:12px}.said img{width:96px;height:96px;object-fit:contain;image-rendering:pixelated;
border:1px solid var(--line);border-radius:4px;flex:none}.said div{min-width:0;overflow-wrap:anywhere;font-size:.88rem}
nav{font-size:.9rem}nav a{margin-right:14px}
@media print{:root{--ground:#fff;--card:#fff;--ink:#000;--soft:#444;--line:#bbb;--accent:#000}
body{font-size:11px}nav,summary{display:none}.card,.tile{break-inside:avoid}.cards{grid-template-columns:1fr 1fr}}
"""


def escaped(value: Any) -> str:
    return html.escape(str(value))


def decimal(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def table_of(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escaped(c)}</th>' for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{escaped(v)}</td>" for v in row) + "</tr>" for row in rows)
    return f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def tiles(values: Mapping[str, str]) -> str:
    return '<div class="tiles">' + "".join(
        f'<div class="tile"><b>{escaped(v)}</b><span>{escaped(k)}</span></div>' for k, v in values.items()) + "</div>"


class Figures:
    """Cards with a figure each; keeps the PNGs."""

    def __init__(self) -> None:
        self.pngs: dict[str, bytes] = {}

    def card(self, name: str, title: str, alt: str, figure: Any, table: str = "") -> str:
        picture = charts.svg(figure, name, alt)
        self.pngs[name] = charts.png(figure)
        charts.pyplot().close(figure)
        more = f"<details><summary>As a table</summary>{table}</details>" if table else ""
        return f'<section class="card"><h3>{escaped(title)}</h3>{picture}{more}</section>'


def grid(cards: Sequence[str]) -> str:
    return '<div class="cards">' + "".join(cards) + "</div>" if cards else ""


def document(title: str, parts: Sequence[str]) -> str:
    body = "\n".join(parts)
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
            f'content="width=device-width,initial-scale=1"><title>{escaped(title)} · pilot-jax</title><link rel="icon" '
            f'href="data:,"><style>{STYLE}</style></head><body><main>{body}</main></body></html>')


def write(out: Path, page: str, pngs: Mapping[str, bytes]) -> list[Path]:
    """The page and, in a folder of its name, the PNGs; what was written."""
    pictures = out.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    for name, data in pngs.items():
        (pictures / f"{name}.png").write_bytes(data)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(out)
    return [out, *(pictures / f"{name}.png" for name in pngs)]
