"""Charts of the reports as figures of `drawing`: rows of marks, strips of dots, lines, and points on a plane.

A mark has a text that the page shows when it is pointed at, and the name of a series that the legend can hide.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from pilot_jax.report.drawing import (
    Canvas,
    Figure,
    Key,
    Scale,
    axis_labels,
    figure,
    shortened,
    span,
    text_width,
    ticks,
)

ROW = 24  # height of a row in px


@dataclasses.dataclass(frozen=True)
class Mark:
    """A value of a series in a row; `low` and `high` are its interval, and a bar begins at 0."""

    key: Key
    value: float
    tip: str
    low: float | None = None
    high: float | None = None
    hollow: bool = False
    bar: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """A row with its name, its marks, and a short text at its end; a row without marks is a heading."""

    name: str
    marks: Sequence[Mark] = ()
    note: str = ""
    gain_from: int | None = None  # number of the mark from which a line leads to the last one


@dataclasses.dataclass(frozen=True)
class Axis:
    """The axis of values: its title, numbers that must be on it, and perhaps a line with a name at one of them."""

    title: str
    around: Sequence[float] = ()
    line: float | None = None
    line_name: str = ""


def _values(rows: Sequence[Row]) -> list[float]:
    marks = [mark for row in rows for mark in row.marks]
    return [v for m in marks for v in (m.value, m.low, m.high) if v is not None]


def _draw_axis(canvas: Canvas, scale: Scale, axis: Axis, top: float, bottom: float) -> None:
    """Draws grid, numbers, title and line of a horizontal axis at the bottom."""
    most = max(2, int((scale.last - scale.first) / 56))
    values = ticks(scale.low, scale.high, most)
    for value, label in zip(values, axis_labels(values), strict=True):
        canvas.line(scale(value), top, scale(value), bottom, "grid")
        canvas.text(scale(value), bottom + 10, label, "middle", class_="soft")
    canvas.text((scale.first + scale.last) / 2, bottom + 27, axis.title, "middle", class_="soft")
    if axis.line is not None:
        x = scale(axis.line)
        canvas.line(x, top, x, bottom, "axis", stroke_dasharray="4 3" if axis.line_name else None,
                    data_tip=axis.line_name or None)


def _draw_mark(canvas: Canvas, scale: Scale, mark: Mark, y: float) -> None:
    colour, x = f"c{mark.key.colour}", scale(mark.value)
    if mark.bar:
        left, right = sorted((scale(max(0.0, scale.low)), x))
        canvas.add("rect", x=left, y=y - 7, width=max(right - left, 1.0), height=14, rx=2, class_=f"bar {colour}",
                   data_series=mark.key.name, data_tip=mark.tip)
    if mark.low is not None and mark.high is not None:
        canvas.line(scale(mark.low), y, scale(mark.high), y, "axis" if mark.bar else f"range {colour}",
                    data_series=mark.key.name)
    if not mark.bar:
        canvas.marker(mark.key.marker, x, y, class_=f"{'hollow' if mark.hollow else 'mark'} {colour}",
                      data_series=mark.key.name, data_tip=mark.tip)


def rows_chart(rows: Sequence[Row], axis: Axis, legend: Sequence[Key] = ()) -> Figure:
    """Returns rows of marks over one axis, each with its name at the left, or above it where names are long."""
    low, high = span(_values(rows), axis.around)
    longest = max((text_width(row.name) for row in rows if row.marks), default=0)
    noted = max((text_width(row.note) for row in rows), default=0)

    def draw(width: int) -> Canvas:
        beside = longest + 12 <= 0.42 * width
        height = ROW if beside else 2 * ROW - 6
        first, last = (longest + 16 if beside else 12), width - max(noted + 10, 20)
        total = sum(height if row.marks else ROW for row in rows)
        canvas, scale, y = Canvas(width, total + 44), Scale(low, high, first, last), 4.0
        _draw_axis(canvas, scale, axis, 2, total + 4)
        for row in rows:
            if not row.marks:
                canvas.text(0, y + ROW / 2, shortened(row.name, width), class_="strong")
                y += ROW
                continue
            middle = y + height - ROW / 2
            canvas.text(longest if beside else 0, middle if beside else middle - 18, shortened(row.name, width - 8),
                        "end" if beside else "start")
            if row.gain_from is not None:
                before, after = row.marks[row.gain_from].value, row.marks[-1].value
                canvas.line(scale(before), middle, scale(after), middle, "join up" if after >= before else "join down")
            for mark in row.marks:
                _draw_mark(canvas, scale, mark, middle)
            if row.note:
                sign = {"+": " up", "−": " down"}.get(row.note[0], "") if row.gain_from is not None else ""
                canvas.text(width, middle, row.note, "end", class_=f"strong{sign}")
            y += height
        return canvas

    return figure(draw, legend)


def strips(groups: Mapping[str, Sequence[Mark]], axis: Axis, legend: Sequence[Key] = ()) -> Figure:
    """Returns one strip of dots per group, for more values than rows have room; dots in one place are stacked."""
    low, high = span([m.value for marks in groups.values() for m in marks], axis.around)

    def draw(width: int) -> Canvas:
        scale, placed, y = Scale(low, high, 10, width - 12), [], 4.0
        for name, marks in groups.items():
            stacks: dict[int, int] = {}
            y += ROW
            spots = []
            for mark in sorted(marks, key=lambda m: m.value):
                column = round(scale(mark.value) / 10)
                spots.append((mark, scale(mark.value), stacks.get(column, 0)))
                stacks[column] = stacks.get(column, 0) + 1
            deepest = max(stacks.values(), default=1)
            gap = min(10.0, 120 / deepest)
            height = gap * (deepest - 1) + 16
            placed.append((name, y - ROW / 2, [(m, x, y + height - 8 - n * gap) for m, x, n in spots]))
            y += height + 4
        canvas = Canvas(width, y + 40)
        _draw_axis(canvas, scale, axis, 2, y)
        for name, top, dots in placed:
            canvas.text(0, top, shortened(name, width), class_="strong")
            for mark, x, height in dots:
                canvas.marker(mark.key.marker, x, height, class_=f"mark c{mark.key.colour}",
                              data_series=mark.key.name, data_tip=mark.tip)
        return canvas

    return figure(draw, legend)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line over the places 0, 1, … of an axis: (place, value, text) of each point."""

    key: Key
    points: Sequence[tuple[int, float, str]]
    thin: bool = False


def lines_chart(lines: Sequence[Line], places: Sequence[str], across: str, up: str, around: Sequence[float] = (),
                legend: Sequence[Key] = ()) -> Figure:
    """Returns lines over named places, such as rounds; a point that is not a finite number is left out."""
    kept = [dataclasses.replace(line, points=[p for p in line.points if math.isfinite(p[1])]) for line in lines]
    low, high = span([p[1] for line in kept for p in line.points], around)
    low = max(low, 0.0) if around and min(around) >= 0 else low

    def draw(width: int) -> Canvas:
        canvas, values = Canvas(width, 248), ticks(low, high, 6)
        labels = axis_labels(values)
        left = max(text_width(label) for label in labels) + 10
        x, y = Scale(0, max(1, len(places) - 1), left + 8, width - 14), Scale(low, high, 202, 26)
        canvas.text(0, 8, up, class_="soft")
        for value, label in zip(values, labels, strict=True):
            canvas.line(left, y(value), width - 6, y(value), "grid")
            canvas.text(left - 6, y(value), label, "end", class_="soft")
        room = max((text_width(name) for name in places), default=0) + 10
        every = max(1, math.ceil(room * len(places) / (width - left)))
        for number in range(0, len(places), every):
            at = x(number) if len(places) > 1 else (x.first + x.last) / 2
            canvas.text(min(at, width - room / 2 + 5), 218, places[number], "middle", class_="soft")
        canvas.text((left + width) / 2, 238, across, "middle", class_="soft")
        for line in kept:
            _draw_line(canvas, line, x, y, len(places))
        return canvas

    return figure(draw, legend)


def _draw_line(canvas: Canvas, line: Line, x: Scale, y: Scale, places: int) -> None:
    spots = [(x(p) if places > 1 else (x.first + x.last) / 2, y(v), tip) for p, v, tip in line.points]
    if not spots:
        return
    colour = f"c{line.key.colour}"
    path = "M" + "L".join(f"{px:.1f} {py:.1f}" for px, py, _ in spots)
    canvas.add("path", d=path, class_=f"line {colour}{' thin' * line.thin}", data_series=line.key.name)
    for px, py, tip in spots:
        if line.thin:
            canvas.add("circle", cx=px, cy=py, r=2, class_=f"bar {colour}", data_series=line.key.name, data_tip=tip)
        else:
            canvas.marker(line.key.marker, px, py, class_=f"mark {colour}", data_series=line.key.name, data_tip=tip)


@dataclasses.dataclass(frozen=True)
class Point:
    """A point on a plane, with its name beside it where there is room."""

    key: Key
    x: float
    y: float
    name: str
    tip: str


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _place_names(canvas: Canvas, spots: Sequence[tuple[Point, float, float]], box: tuple[float, ...]) -> None:
    """Writes each point's name at a side where it hides nothing; names without room are left to pointing."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for _, x, y in spots]
    for number, (point, x, y) in enumerate(spots):
        width = text_width(point.name)
        for left, middle in ((x + 9, y), (x - 9 - width, y), (x - width / 2, y - 14), (x - width / 2, y + 14)):
            place = (left, middle - 8, left + width, middle + 8)
            free = not any(_overlap(place, other) for i, other in enumerate(taken) if i != number)
            if free and place[0] >= box[0] and place[2] <= box[2] and place[1] >= box[1] and place[3] <= box[3]:
                taken.append(place)
                canvas.text(left, middle, point.name, data_series=point.key.name)
                break


def points_chart(points: Sequence[Point], across: str, up: str, equal: bool = False,
                 around: tuple[Sequence[float], Sequence[float]] = ((), ()), legend: Sequence[Key] = ()) -> Figure:
    """Returns points on a plane; with `equal`, both axes have one scale and no numbers, as on a map."""
    low_x, high_x = span([p.x for p in points], around[0])
    low_y, high_y = span([p.y for p in points], around[1])

    def draw(width: int) -> Canvas:
        height = 270.0
        canvas = Canvas(width, height)
        if equal:
            room = max((high_x - low_x) / (width - 80), (high_y - low_y) / (height - 50))
            cx, cy = (low_x + high_x) / 2, (low_y + high_y) / 2
            x = Scale(cx - room * width / 2, cx + room * width / 2, 0, width)
            y = Scale(cy - room * height / 2, cy + room * height / 2, height, 0)
            canvas.add("rect", x=0.5, y=0.5, width=width - 1.0, height=height - 1, fill="none", class_="grid")
            box: tuple[float, ...] = (2, 2, width - 2, height - 2)
        else:
            values = ticks(low_y, high_y, 6)
            labels = axis_labels(values)
            left = max(text_width(label) for label in labels) + 10
            x, y = Scale(low_x, high_x, left + 8, width - 16), Scale(low_y, high_y, height - 44, 26)
            canvas.text(0, 8, up, class_="soft")
            for value, label in zip(values, labels, strict=True):
                canvas.line(left, y(value), width - 6, y(value), "grid")
                canvas.text(left - 6, y(value), label, "end", class_="soft")
            _draw_axis(canvas, x, Axis(across), 22, height - 42)
            box = (left, 20, width, height - 44)
        spots = [(p, x(p.x), y(p.y)) for p in points]
        for point, px, py in spots:
            canvas.marker(point.key.marker, px, py, class_=f"mark c{point.key.colour}", data_series=point.key.name,
                          data_tip=point.tip)
        _place_names(canvas, spots, box)
        return canvas

    return figure(draw, legend)
