"""Draws docs/emoji.png: eight concepts of the emoji set in its three styles.

    python docs/emoji.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from pilot_jax.real.emoji import STYLES, concepts, picture

NAMES = ("fox", "owl", "octopus", "banana", "locomotive", "castle", "guitar", "hot face")
GAP = 12  # pixels between pictures


def main() -> None:
    """Writes the picture: a row for each style, a column for each concept."""
    by_name = {concept.name: concept for concept in concepts()}
    shown = [[picture(by_name[name], style).image for name in NAMES] for style in STYLES]
    side = shown[0][0].width
    sheet = Image.new("RGB", ((side + GAP) * len(NAMES) + GAP, (side + GAP) * len(STYLES) + GAP), "white")
    for row, images in enumerate(shown):
        for column, image in enumerate(images):
            sheet.paste(image, (GAP + column * (side + GAP), GAP + row * (side + GAP)))
    sheet.quantize(256, dither=Image.Dither.NONE).save(Path(__file__).with_suffix(".png"), optimize=True)


if __name__ == "__main__":
    main()
