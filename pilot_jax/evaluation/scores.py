"""Scores of one answer against its reference, in [0, 1]."""

from __future__ import annotations

import re
from collections.abc import Callable


def exact(answer: str, reference: str) -> float:
    """1 if equal after lower-casing and folding white space."""
    return float(" ".join(answer.lower().split()) == " ".join(reference.lower().split()))


def parse_box(text: str) -> tuple[float, float, float, float] | None:
    """The first four numbers of a text as (x0, y0, x1, y1), or None."""
    numbers = re.findall(r"\d+(?:\.\d+)?", text)
    return tuple(float(n) for n in numbers[:4]) if len(numbers) >= 4 else None


def box_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of (x0, y0, x1, y1) boxes; 0 for an empty one."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(width, 0.0) * max(height, 0.0)
    area = sum(max(x1 - x0, 0.0) * max(y1 - y0, 0.0) for x0, y0, x1, y1 in (a, b))
    return overlap / (area - overlap) if area > overlap else 0.0


def iou(answer: str, reference: str) -> float:
    """1 if the boxes overlap by IoU ≥ 0.5."""
    a, b = parse_box(answer), parse_box(reference)
    return float(a is not None and b is not None and box_iou(a, b) >= 0.5)


METRICS: dict[str, Callable[[str, str], float]] = {"exact": exact, "iou": iou}
