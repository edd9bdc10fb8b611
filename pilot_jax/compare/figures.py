"""Draws the PNG files of a comparison and of a sweep with matplotlib; the figures of the HTML page are in `cards`."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pilot_jax.compare.difference_table import difference_to, references_of, subject
from pilot_jax.compare.tables import Record, by_score, of_variant, tasks_of
from pilot_jax.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, COLOURS = "#1b1f24", ("#2a78d6", "#d9622b")
WIDTH = 4.4  # width of a figure in inches
MARKERS = "osD^v<>pPX*hd"  # of the tasks; more tasks begin again
MOST_INSIDE = 5  # largest number of tasks whose legend is inside the figure
ROW = 0.2  # height of a variant's row in inches; a figure is 0.7 inches higher than its rows, and 1.5 at least


def pyplot() -> Any:
    """Returns `matplotlib.pyplot` with the style of these figures; no display is needed.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise InputError("compare: figures need matplotlib, which is not installed (it is in the extra 'plots'). Run: "
                         "pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "text.parse_math": False, "font.size": 8, "font.family": "sans-serif", "text.color": INK,
        "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "legend.frameon": False,
        "legend.fontsize": 7, "axes.titlesize": 8})
    return plt


def png(figure: Figure) -> bytes:
    """Returns the figure as a PNG file with a white background, and closes it."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160, facecolor="white")
    pyplot().close(figure)
    return out.getvalue()


def _colour(line: Record) -> str:
    """Returns the colour of a variant: one for `pilot`, and another for all others."""
    return COLOURS[1] if line["name"] == "pilot" else COLOURS[0]


def label(line: Record) -> str:
    """Returns a variant's name, with an ellipsis in the middle of a long one: a figure has room for 34 characters."""
    name = line["name"]
    return name if len(name) <= 34 else f"{name[:15]}…{name[-18:]}"


def _legend_label(name: str) -> str:
    """Returns a name, shortened as by `label`, for a legend, from which matplotlib leaves out what begins with an
    underscore."""
    return f" {short}" if (short := label({"name": name})).startswith("_") else short


def _legend_columns(names: Sequence[str]) -> int:
    """Returns how many columns a legend as wide as the figure has room for."""
    return max(1, min(6, 150 // (8 + max(map(len, names)))))


def _draw_scores(axes: Axes, results: Record, lines: Sequence[Record]) -> None:
    """Draws the mean score of each variant with its standard error, and a line at the base model's score."""
    rows = np.arange(len(lines))
    axes.barh(rows, [line["score"] for line in lines], xerr=[line["standard_error"] or 0 for line in lines],
              height=0.62, color=[_colour(line) for line in lines], alpha=0.85,
              error_kw={"ecolor": INK, "lw": 0.8})
    if results["base"]["score"] is not None:
        axes.axvline(results["base"]["score"], color=INK, lw=0.8, ls=":", label="base model")
    axes.set_yticks(rows, [label(line) for line in lines])
    axes.set_xlim(0, 1)
    axes.set_xlabel("score: mean over clients and seeds")


def _draw_tasks(axes: Axes, results: Record, lines: Sequence[Record]) -> None:
    """Draws a mark at each variant's score on each task."""
    for task, marker in zip(tasks_of(results), itertools.cycle(MARKERS)):
        axes.scatter([line["by_task"].get(task, np.nan) for line in lines], range(len(lines)), marker=marker, s=12,
                     zorder=3, facecolor="white", edgecolor=INK, lw=0.7, label=_legend_label(task))


def _draw_differences(axes: Axes, lines: Sequence[Record], reference: str) -> None:
    """Draws the difference to a reference with its 95 % interval; the mark is filled if it is significant."""
    for row, line in enumerate(lines):
        d = difference_to(line, reference)
        if d is None:
            continue
        low, high = (d["mean"], d["mean"]) if d["low"] is None else (d["low"], d["high"])
        axes.plot([low, high], [row, row], color=INK, lw=0.9)
        axes.plot(d["mean"], row, "o", ms=4.5, color=COLOURS[1], mew=1,
                  markerfacecolor=COLOURS[1] if d["significant"] else "none")
    axes.axvline(0, color=INK, lw=0.6, alpha=0.6)
    axes.set_yticks(range(len(lines)), [label(line) for line in lines])
    axes.set_xlabel(f"difference of scores, {subject(reference)}")
    axes.grid(axis="x", color=INK, alpha=0.12, lw=0.5)


def overview(results: Record) -> Figure:
    """Draws the scores, with a mark for each task, and the differences to the first reference side by side."""
    lines, tasks = by_score(results), tasks_of(results)
    columns = _legend_columns(["base model", *map(_legend_label, tasks)])
    below = 0 if len(tasks) <= MOST_INSIDE else -(-(len(tasks) + 1) // columns)  # lines of a legend below the figure
    figure, (left, right) = pyplot().subplots(
        1, 2, figsize=(2 * WIDTH, max(1.5, 0.7 + ROW * len(lines)) + ROW * below), sharey=True, layout="constrained",
        width_ratios=(3, 2))
    _draw_scores(left, results, lines)
    _draw_tasks(left, results, lines)
    if below:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=columns)
    else:
        left.legend(loc="lower right")
    _draw_differences(right, lines, next(iter(references_of(results)), "pilot"))
    return figure


def sweep(key: str, values: Sequence[str], compared: Sequence[Record]) -> Figure:
    """Draws each variant's score over the values of a config key."""
    figure, axes = pyplot().subplots(figsize=(7, 4), layout="constrained")
    for name in (line["name"] for line in compared[0]["variants"]):
        lines = of_variant(name, compared)
        axes.errorbar(range(len(values)), [one["score"] for one in lines],
                      yerr=[one["standard_error"] or 0 for one in lines], marker="o", ms=4, capsize=2,
                      label=_legend_label(name), lw=2.2 if name == "pilot" else 1.2)
    axes.set_xticks(range(len(values)), values)
    axes.set_xlabel(key)
    axes.set_ylabel("score: mean over clients and seeds")
    axes.set_ylim(0, 1)
    axes.legend(fontsize=8)
    return figure
