"""Draws the figures of the reports.

All lines and texts have the colour `INK`, which the HTML page replaces by its text colour, and fills are translucent,
so that a figure is legible on a light and on a dark page.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pilot_jax.errors import InputError
from pilot_jax.report.record import Mixing, Record, RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1b1f24"
COLOURS = ("#2a78d6", "#d9622b", "#159a6c", "#a45bd0", "#b8860b", "#d6457f", "#4c8a8f", "#7d7d7d")
WIDTH = 4.4  # width of a figure in inches; at 72 points per inch it fits on a phone
MOST_NAMES = 24  # most clients whose names and numbers fit into a figure
MOST_ROWS = 60  # most rows of a figure of cells that has names and numbers


def pyplot() -> Any:
    """Returns `matplotlib.pyplot` with the style of the report's figures; no display is needed.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("report: figures need matplotlib, which is not installed (it is in the extra 'plots'). Run: "
                         "pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "svg.fonttype": "none", "text.parse_math": False,
        "font.size": 8, "font.family": "sans-serif", "text.color": INK, "axes.edgecolor": INK,
        "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
        "axes.spines.right": False, "axes.linewidth": 0.6, "legend.frameon": False, "legend.fontsize": 7,
        "axes.titlesize": 8})
    return plt


def new_axes(height: float) -> tuple[Figure, Axes]:
    """Returns a new figure of the given height in inches, and its axes."""
    return pyplot().subplots(figsize=(WIDTH, height), layout="constrained")


def svg(figure: Figure, name: str, text: str) -> str:
    """Returns the figure as an `<svg>` element for an HTML page.

    Args:
        name: prefix of the element ids in this figure, different for each figure of a page.
        text: description of the figure for screen readers.
    """
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # makes the ids the same each time a report is written
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    body = out.getvalue()
    body = body[body.index("<svg"):].replace(INK, "currentColor")
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)  # makes the ids unique on the page
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", body, count=1)
    return body.replace("<svg", f'<svg role="img" aria-label="{html.escape(text)}"', 1)


def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG file with a white background."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160, facecolor="white")
    return out.getvalue()


def scores(runs: Sequence[RunRecord]) -> Figure:
    """Draws every client's score in each run, and the base model's score on the client's data."""
    task_of = {c: t for r in runs for c, t in r.task_of.items()}
    clients = sorted({c for r in runs for c in r.summary["score_by_client"]}, key=lambda c: (task_of[c], c))
    figure, axes = new_axes(min(0.9 + 0.2 * len(clients), 9))
    base: dict[str, float] = next((r.summary["score_base_by_client"] for r in runs), {})
    height = {c: len(clients) - 1 - i for i, c in enumerate(clients)}
    axes.scatter([base.get(c, np.nan) for c in clients], list(height.values()), marker="|", s=60, color=INK,
                 label="base model", linewidths=1.2)
    for number, run in enumerate(runs):
        values = run.summary["score_by_client"]
        axes.scatter(list(values.values()), [height[c] for c in values], s=26, color=COLOURS[number % len(COLOURS)],
                     label=run.name if len(runs) > 1 else run.summary["strategy"], alpha=0.9, zorder=3)
    axes.set_yticks(list(height.values()) if len(clients) <= MOST_NAMES else [],
                    clients if len(clients) <= MOST_NAMES else [])
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("score on test data")
    axes.grid(axis="both", color=INK, alpha=0.12, lw=0.5)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    return figure


def _phase_name(line: Record) -> str:
    return f"{line['round']}·{line['phase'].removeprefix('stage')}"


def losses(run: RunRecord) -> Figure:
    """Draws each client's mean training loss in each phase, as one line per client in its task's colour."""
    figure, axes = new_axes(2.6)
    names, tasks = list(dict.fromkeys(map(_phase_name, run.updates))), run.tasks
    for client, task in sorted(run.task_of.items(), key=lambda pair: (pair[1], pair[0])):
        own = [u for u in run.updates if u["client"] == client]
        if own:
            axes.plot([names.index(_phase_name(u)) for u in own],
                      [u["loss"] for u in own], marker="o", ms=2.5, lw=0.9, alpha=0.8,
                      color=COLOURS[tasks.index(task) % len(COLOURS)] if task in tasks else INK)
    for number, task in enumerate(tasks):
        axes.plot([], [], color=COLOURS[number % len(COLOURS)], label=task)
    step = max(1, len(names) // 12)
    axes.set_xticks(range(0, len(names), step), names[::step])
    axes.set_xlabel("phase: round·stage")
    axes.set_ylabel("training loss")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right", ncols=2)
    return figure


def over_rounds(runs: Sequence[RunRecord]) -> Figure:
    """Draws the mean validation score of each scored round; for a single run, also the mean of each task."""
    figure, axes = new_axes(2.4)

    def line(values: Sequence[Record], **style: Any) -> None:
        rounds = sorted({v["round"] for v in values})
        axes.plot(rounds, [np.mean([v["score"] for v in values if v["round"] == r]) for r in rounds], marker="o", ms=3,
                  **style)

    for number, run in enumerate(runs):
        line(run.validation, label=run.name if len(runs) > 1 else "mean",
             color=COLOURS[number % len(COLOURS)] if len(runs) > 1 else INK)
    for number, task in enumerate(runs[0].tasks if len(runs) == 1 else ()):
        line([v for v in runs[0].validation if runs[0].task_of.get(v["client"]) == task], label=task, lw=0.9,
             color=COLOURS[number % len(COLOURS)])
    axes.set_ylim(0, 1)
    axes.set_xlabel("round")
    axes.set_ylabel("validation score")
    axes.legend()
    return figure


def _show_cells(axes: Axes, opacity: np.ndarray) -> None:
    """Draws an array [rows, columns] of opacities in [0, 1] as cells of one colour."""
    from matplotlib.colors import to_rgba

    ground = np.tile(np.asarray(to_rgba(COLOURS[0])), (*opacity.shape, 1))
    ground[..., 3] = opacity
    axes.imshow(ground, aspect="auto", interpolation="nearest")
    axes.spines[["top", "right"]].set_visible(True)


def heat_map(mixing: Mixing) -> Figure:
    """Draws the mixing matrix. A cell's opacity is the square root of its weight, since most weights are small."""
    count = len(mixing.clients)
    figure, axes = new_axes(WIDTH * 0.86)
    _show_cells(axes, np.sqrt(np.clip(mixing.weights, 0, 1)))
    if count <= MOST_NAMES:
        axes.set_xticks(range(count), mixing.clients, rotation=90)
        axes.set_yticks(range(count), mixing.clients)
    if count <= 12:
        for i, j in zip(*np.nonzero(mixing.weights >= 0.005), strict=True):
            axes.text(j, i, f"{mixing.weights[i, j]:.2f}".lstrip("0"), ha="center", va="center", fontsize=6)
    axes.set_xlabel("client whose upload is mixed in")
    axes.set_ylabel("client that receives the mixture")
    return figure


def cells(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], across: str, down: str) -> Figure:
    """Draws numbers in [0, 1] as a table of more or less opaque cells.

    Args:
        values: float [rows, columns]; nan makes an empty cell.
        rows, columns: the names of rows and columns. With more than MOST_ROWS rows no names or numbers are drawn.
        across, down: axis titles, of the columns and of the rows.
    """
    named = len(rows) <= MOST_ROWS
    figure, axes = new_axes(0.9 + 0.22 * len(rows) if named else 9)
    _show_cells(axes, np.nan_to_num(np.clip(values, 0, 1)) * 0.8)
    axes.set_xticks(range(len(columns)), columns, rotation=0 if len(columns) <= 5 else 90)
    axes.set_yticks(range(len(rows)) if named else [], rows if named else [])
    if named:
        for i, j in zip(*np.nonzero(np.isfinite(values)), strict=True):
            axes.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=7)
    axes.set_xlabel(across)
    axes.set_ylabel(down)
    return figure


def positions(distances: np.ndarray) -> np.ndarray:
    """Returns points [S, 2] whose distances approximate `distances` [S, S], by classical multidimensional scaling."""
    squared = np.where(np.isfinite(distances), distances, 0.0) ** 2
    centre = np.eye(len(squared)) - 1 / len(squared)
    values, vectors = np.linalg.eigh(-0.5 * centre @ squared @ centre)
    best = np.argsort(values)[::-1][:2]
    return vectors[:, best] * np.sqrt(np.maximum(values[best], 0))


def client_map(run: RunRecord, mixing: Mixing) -> Figure:
    """Draws the clients as points, in their tasks' colours, at distances that approximate those of their uploads."""
    figure, axes = new_axes(WIDTH * 0.8)
    assert mixing.distances is not None
    points = positions(mixing.distances)
    for number, task in enumerate(run.tasks):
        of = [i for i, c in enumerate(mixing.clients) if run.task_of.get(c) == task]
        axes.scatter(points[of, 0], points[of, 1], color=COLOURS[number % len(COLOURS)], s=30, label=task, alpha=0.9)
    if len(mixing.clients) <= MOST_NAMES:
        for name, (x, y) in zip(mixing.clients, points, strict=True):
            axes.annotate(name, (x, y), textcoords="offset points", xytext=(4, 3), fontsize=6)
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.18)
    axes.grid(color=INK, alpha=0.12, lw=0.5)
    axes.legend(loc="best")
    return figure


def traffic(run: RunRecord) -> Figure:
    """Draws the megabytes uploaded and downloaded in the whole run, by subtree of the adapters."""
    totals: dict[str, dict[str, int]] = {}
    for way in ("up", "down"):
        for phase in run.phases:
            for name, size in phase.get(f"bytes_{way}_by_subtree", {}).items():
                totals.setdefault(name, {}).setdefault(way, 0)
                totals[name][way] += size
    figure, axes = new_axes(0.8 + 0.45 * len(totals))
    for number, (way, label) in enumerate((("up", "uploaded"), ("down", "downloaded"))):
        axes.barh(np.arange(len(totals)) + (0.2 - 0.4 * number),
                  [t.get(way, 0) / 1e6 for t in totals.values()], 0.36, color=COLOURS[number], label=label)
    axes.set_yticks(range(len(totals)), list(totals))
    axes.set_xlabel("MB, all clients and rounds")
    axes.legend()
    return figure


def times(run: RunRecord) -> Figure:
    """Draws the seconds of each phase, divided into local training and image features."""
    figure, axes = new_axes(2.2)
    names = [_phase_name(p) for p in run.phases]
    bottom = np.zeros(len(names))
    for number, (key, label) in enumerate((("seconds", "local training, compilation included"),
                                           ("feature_seconds", "image features"))):
        values = np.asarray([p.get(key, 0.0) for p in run.phases])
        if values.max(initial=0) > 0.05:
            axes.bar(range(len(names)), values, 0.7, bottom=bottom, color=COLOURS[number], label=label)
            bottom += values
    step = max(1, len(names) // 12)
    axes.set_xticks(range(0, len(names), step), names[::step])
    axes.set_xlabel("phase: round·stage")
    axes.set_ylabel("seconds")
    axes.legend()
    return figure
