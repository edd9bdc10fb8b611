"""Makes the figure of the mixing matrices of a run: one picture, and a slider over the phases."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from pilot_jax.report.drawing import Canvas, figure, shortened, text_width
from pilot_jax.report.record import Mixing
from pilot_jax.report.rendering import Card, Table
from pilot_jax.words import counted

MOST_WEIGHTS = 240_000  # most weights of all matrices on a page; each takes about three bytes
MOST_PHASES = 60  # most matrices on a page
MOST_NUMBERS = 9  # most clients whose weights are written into the cells
MOST_ALIGNED = 150  # most clients in a matrix that has all clients of a run although only some take part in a round
MOST_COLUMNS = 12  # most clients with a column each in the table
INK = (35, 104, 196)  # colour of the cells


def shown_phases(mixing: Sequence[Mixing]) -> list[Mixing]:
    """Returns the phases that the page shows: all, or as many as it has room for, evenly, with the first and last."""
    largest = max(len(m.clients) for m in mixing)
    most = max(2, min(MOST_PHASES, MOST_WEIGHTS // largest**2))
    if len(mixing) <= most:
        return list(mixing)
    return [mixing[round(i * (len(mixing) - 1) / (most - 1))] for i in range(most)]


def opacities(weights: np.ndarray) -> np.ndarray:
    """Returns cells' opacities in [0, 1]: the square roots of the weights, since most weights are small."""
    return np.sqrt(np.clip(weights, 0, 1))


def picture(weights: np.ndarray) -> str:
    """Returns a matrix as a PNG data URI with one pixel per weight, in one colour that is the more opaque the larger
    the weight."""
    pixels = np.empty((*weights.shape, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = INK, np.round(255 * opacities(weights))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _packed(weights: np.ndarray) -> str:
    """Returns weights as base64 of little-endian uint16 in units of 1/65535."""
    return base64.b64encode(np.round(np.clip(weights, 0, 1) * 65535).astype("<u2").tobytes()).decode()


def _groups(clients: Sequence[str], task_of: Mapping[str, str]) -> list[tuple[str, int, int]]:
    """Returns (task, first, end) of each run of clients with the same task."""
    out: list[tuple[str, int, int]] = []
    for number, client in enumerate(clients):
        task = task_of.get(client, "")
        if out and out[-1][0] == task:
            out[-1] = (task, out[-1][1], number + 1)
        else:
            out.append((task, number, number + 1))
    return out


def aligned(mixing: Sequence[Mixing], order: Sequence[str]) -> list[Mixing]:
    """Returns matrices that have the same clients in the given order, with zeros where a client took no part.

    If they would have more than MOST_ALIGNED clients, the matrices are returned as they are."""
    present = dict.fromkeys(client for m in mixing for client in m.clients)
    names = [*(name for name in order if name in present), *(name for name in present if name not in order)]
    if all(m.clients == mixing[0].clients for m in mixing) or len(names) > MOST_ALIGNED:
        return list(mixing)
    out = []
    for m in mixing:
        at = [names.index(client) for client in m.clients]
        weights, neighbours = np.zeros((len(names), len(names))), np.full(len(names), np.nan)
        weights[np.ix_(at, at)], neighbours[at] = m.weights, m.effective_neighbors
        out.append(Mixing(m.name, names, weights, None, neighbours))
    return out


def _draw(mixing: Mixing, task_of: Mapping[str, str], width: int, with_names: bool) -> Canvas:
    """Draws the matrix with the clients' names, or with those of their tasks where the cells are too small."""
    count = len(mixing.clients)
    longest = min(max(map(text_width, mixing.clients)), 0.28 * width)
    named = (width - longest - 8) / count >= 14
    names = [(name, i, i + 1) for i, name in enumerate(mixing.clients)] if named else _groups(mixing.clients, task_of)
    if not with_names:
        names, longest = [], 0.0
    room = min(max((text_width(name) for name, _, _ in names), default=0), 0.28 * width) + 6
    side = min(width - room - 2, 420.0)
    cell = side / count
    canvas = Canvas(room + side + 2, side + room + 24)
    canvas.raw(f'<image class="cells" x="{room:.1f}" y="0" width="{side:.1f}" height="{side:.1f}" '
               f'preserveAspectRatio="none" href="{picture(mixing.weights)}"/>')
    canvas.add("rect", x=room, y=0, width=side, height=side, fill="none", class_="axis")
    for name, first, end in names:
        if (end - first) * cell >= 13:
            middle, label = (first + end) / 2 * cell, shortened(name, room - 6)
            canvas.text(room - 6, middle, label, "end")
            canvas.add("text", label, transform=f"translate({room + middle + 4:.1f} {side + 6:.1f}) rotate(-90)",
                       text_anchor="end")
        if not named and first:
            for x0, y0, x1, y1 in ((first * cell, 0, first * cell, side), (0, first * cell, side, first * cell)):
                canvas.line(room + x0, y0, room + x1, y1, "grid")
    canvas.text(room + side / 2, side + room + 12, "client whose upload is mixed in", "middle", class_="soft")
    for i, j in np.ndindex(count, count) if count <= MOST_NUMBERS else ():
        canvas.text(room + (j + 0.5) * cell, (i + 0.5) * cell, weight_text(float(mixing.weights[i, j])), "middle",
                    data_cell=f"{i},{j}", class_="onlight" if opacities(mixing.weights[i, j]) < 0.6 else "ondark")
    return canvas


def weight_text(weight: float) -> str:
    """Returns a weight as a cell shows it: two decimals without the leading zero; nothing below 0.005."""
    return "" if weight < 0.005 else f"{weight:.2f}".removeprefix("0")


def _table(phases: Sequence[Mixing]) -> Table:
    """Returns every weight of few clients, or of many the largest three weights of others in each client's mixture."""
    names = phases[-1].clients
    if all(m.clients == names for m in phases) and len(names) <= MOST_COLUMNS:
        rows = [[m.name, client, *(f"{w:.2f}" for w in row)]
                for m in phases for client, row in zip(m.clients, m.weights, strict=True)]
        return Table(["phase", "client that receives", *names], rows,
                     [number for number, m in enumerate(phases) for _ in m.clients])
    kept = phases if sum(len(m.clients) for m in phases) <= 2000 else phases[-1:]
    rows, groups = [], []
    for number, m in enumerate(phases):
        for i, client in enumerate(m.clients) if m is phases[-1] or kept is phases else ():
            if not m.weights[i].any():  # the client took no part
                continue
            order = [j for j in np.argsort(-m.weights[i], kind="stable") if j != i and m.weights[i, j] >= 0.005][:3]
            rows.append([m.name, client, f"{m.weights[i, i]:.2f}", f"{m.effective_neighbors[i]:.2f}",
                         ", ".join(f"{m.clients[j]} {m.weights[i, j]:.2f}" for j in order) or "–"])
            groups.append(number)
    return Table(["phase", "client that receives", "own weight", "effective neighbours", "largest weights of others"],
                 rows, groups, "" if kept is phases else f"Only {phases[-1].name} is in this table.")


def mixing_card(mixing: Sequence[Mixing], task_of: Mapping[str, str], name: str) -> Card:
    """Returns the figure of a run's mixing matrices, the last one first."""
    everyone = aligned(mixing, list(task_of))
    phases = shown_phases(everyone)
    last, same = phases[-1], all(m.clients == phases[0].clients for m in phases)
    left_out = f" {len(phases)} of {len(mixing)} phases are shown." if len(phases) < len(mixing) else ""

    def text(one: Mixing) -> str:
        present = np.isfinite(one.effective_neighbors)
        return (f"{one.name}: {counted(int(present.sum()), 'client')}, "
                f"{float(np.mean(one.effective_neighbors[present])):.2f} effective neighbours on average")

    return Card(
        name, "Who receives from whom: the mixing matrix",
        f"Mixing matrix of {counted(len(last.clients), 'client')} in {counted(len(phases), 'phase')}. "
        f"In {text(last)}.", figure(lambda width: _draw(last, task_of, width, same)),
        about="A row is a client, and its cells are the weights of all clients' uploads in what it receives; the more "
              "solid, the larger. An effective neighbour is one client that counts fully; the client itself is one."
              + ("" if same else " The clients differ from phase to phase: point at a cell for their names.")
              + left_out,
        table=_table(phases), phases=[text(m) for m in phases],
        data={"ink": list(INK), "phases": [
            {"clients": m.clients, "weights": _packed(m.weights)} for m in phases]})
