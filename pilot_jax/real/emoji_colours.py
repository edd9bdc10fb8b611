"""The colour that most of a picture has, counted pixel by pixel; `emoji_build.py` stores it with the picture."""

from __future__ import annotations

import numpy as np

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "grey", "white")
LEAD = 1.4  # a colour is the picture's if it has this many times the pixels of the next
NEIGHBOURS = frozenset(map(frozenset, (  # shades of one thing: where both are much of it, either is right
    ("red", "pink"), ("red", "orange"), ("red", "brown"), ("orange", "yellow"), ("orange", "brown"),
    ("blue", "purple"), ("purple", "pink"), ("white", "grey"), ("grey", "black"))))


def hue_saturation_value(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the hue in degrees, the saturation and the value in [0, 1], each [n], of pixels in [0, 1], [n, 3]."""
    r, g, b = rgb.T
    value, low = rgb.max(1), rgb.min(1)
    span = value - low
    safe = np.where(span > 0, span, 1)
    hue = np.where(value == r, (g - b) / safe % 6, np.where(value == g, (b - r) / safe + 2, (r - g) / safe + 4)) * 60
    return hue % 360, np.where(value > 0, span / np.where(value > 0, value, 1), 0), value


def pixel_colours(rgb: np.ndarray) -> np.ndarray:
    """Returns whether each pixel, float [n, 3] in [0, 1], may be called by each name of `COLOURS`, bool [n, 11].

    A pixel between two colours has both names, and a cream one has none.
    """
    h, s, v = hue_saturation_value(rgb)
    warm = (h > 8) & (h <= 50)
    rules = (  # names, and the pixels that have them unless a later rule applies
        ("red", (h <= 10) | (h > 346)), ("red orange", (h > 10) & (h <= 20)), ("orange", (h > 20) & (h <= 35)),
        ("orange yellow", (h > 35) & (h <= 41)), ("yellow", (h > 41) & (h <= 60)),
        ("yellow green", (h > 60) & (h <= 72)), ("green", (h > 72) & (h <= 164)),
        ("green blue", (h > 164) & (h <= 184)), ("blue", (h > 184) & (h <= 246)),
        ("blue purple", (h > 246) & (h <= 258)), ("purple", (h > 258) & (h <= 296)),
        ("purple pink", (h > 296) & (h <= 312)), ("pink", (h > 312) & (h <= 346)),
        ("red pink", (h > 334) & (h <= 348) & (s > 0.75)),
        ("red pink", ((h <= 14) | (h > 340)) & (s < 0.68) & (v > 0.8)),
        ("pink", ((h <= 20) | (h > 312)) & (s < 0.55) & (v > 0.75)),
        ("purple", (h > 296) & (h <= 340) & (v < 0.55)),
        ("brown", warm & (v < 0.72)), ("brown", warm & (h <= 26) & (s < 0.68) & (s > 0.4) & (v < 0.86)),
        ("brown", ((h <= 8) | (h > 340)) & (s < 0.62) & (v < 0.6)), ("brown red", (h <= 8) & (s >= 0.62) & (v < 0.45)),
        ("brown", (h > 14) & (h <= 50) & (s < 0.55) & (v < 0.86)),
        ("", (h > 14) & (h <= 66) & (s < 0.4) & (v >= 0.86)),  # cream, beige
        ("grey", s < 0.15), ("grey", (s < 0.3) & (h > 180) & (h < 290) & (v < 0.78)), ("grey", (s < 0.25) & (v < 0.5)),
        ("blue grey", (s >= 0.3) & (s < 0.4) & (h > 180) & (h < 250) & (v < 0.65)),
        ("white grey", (s < 0.13) & (v > 0.78)), ("white", (s < 0.1) & (v > 0.9)),
        ("black grey", (v < 0.38) & (s < 0.45)), ("black", (v < 0.24) | ((v < 0.3) & (s < 0.4))))
    number = np.zeros(len(rgb), int)
    table = np.zeros((len(rules), len(COLOURS)), bool)
    for row, (names, where) in enumerate(rules):
        number[where] = row
        table[row, [COLOURS.index(name) for name in names.split()]] = True
    return table[number]


def main_colours(rgba: np.ndarray) -> tuple[str, ...]:
    """Returns the names of the colour that most opaque pixels of a picture have, uint8 [H, W, 4].

    They are one name, or two where people might say either, or none where no colour leads.
    """
    pixels = rgba.reshape(-1, 4)
    pixels = pixels[pixels[:, 3] > 200][:, :3] / 255.0
    named = pixel_colours(pixels)
    votes = named.sum(0)
    first = int(votes.argmax())
    others = (named & ~named[:, first:first + 1]).sum(0)  # pixels that have another name and not the first
    if votes[first] < 0.35 * len(pixels) or votes[first] == 0:
        return ()
    near = [i for i in range(len(COLOURS)) if frozenset((COLOURS[i], COLOURS[first])) in NEIGHBOURS]
    if any(votes[first] < LEAD * others[i] for i in range(len(COLOURS)) if i not in near):
        return ()
    between = (named & named[:, first:first + 1]).sum(0) > 0.6 * votes[first]
    also = [i for i in range(len(COLOURS)) if i != first and (
        between[i] or (i in near and votes[first] < LEAD * others[i]))]
    return (COLOURS[first], *(COLOURS[i] for i in sorted(also, key=lambda i: -votes[i])[:1]))
