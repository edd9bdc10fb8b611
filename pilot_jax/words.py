"""Says numbers in words: counts with their plurals, scores, changes, and lists of names. Reads such lists, and quotes
texts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def counted(count: int, noun: str, plural: str = "") -> str:
    """Returns a count with its noun, such as "1 round" or "1,200 rounds"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def agree(count: int, noun: str, one: str, more: str) -> str:
    """Returns a count with its noun and the verb that fits, such as "1 sample has" or "2 samples have"."""
    return f"{counted(count, noun)} {one if count == 1 else more}"


def decimal(value: float | None, digits: int = 3) -> str:
    """Returns a number with the given number of decimals; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def change(value: float, digits: int = 2) -> str:
    """Returns a difference with its sign; without one if it is 0 with these decimals."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{'+' if value > 0 else '−'}{text}"


def listed(names: Sequence[str], most: int = 4) -> str:
    """Returns names as a list in words; of many, the first and how many others there are."""
    if len(names) > most:
        return f"{', '.join(names[:most - 1])} and {counted(len(names) - most + 1, 'other')}"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else "none"


def separated(text: str) -> list[str]:
    """Returns the parts of a text between commas, without space around them; brackets, as of lists in YAML, are left
    whole."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "[{") - (c in "]}")
        if c == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def duration(seconds: float) -> str:
    """Returns a time in the unit that suits it, such as "40 ms", "0.4 s", "12 s", "3.5 min" or "2.1 h"."""
    if 0 < seconds < 0.0995:
        return f"{max(1, round(1000 * seconds))} ms"
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def scaled(value: float) -> str:
    """Returns a number with a decimal prefix, such as "1.5 G", to which its unit can be added."""
    for prefix, of in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * of:
            return f"{value / of:.3g} {prefix}" if value < 999.5 * of else f"{value / of:,.0f} {prefix}"
    return f"{value:.3g} "


def size(count: float) -> str:
    """Returns a number of bytes in the unit that suits it, such as "950 B", "16.1 MB" or "1.88 GB"."""
    for unit, of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * of:
            return f"{count / of:.3g} {unit}" if count < 999.5 * of else f"{count / of:,.0f} {unit}"
    return f"{count:,.0f} B"


def toml_text(text: str) -> str:
    """Returns a text as a value in TOML, with escapes for all quotes in it and for backslashes.

    Flower's `--node-config` cannot read a value with quotes inside, and a shell changes nothing else between single
    quotes."""
    return '"' + "".join(c if c.isprintable() and c not in "\"'\\" else f"\\U{ord(c):08X}" for c in text) + '"'


def yaml_text(value: object) -> str:
    """Returns a JSON value as YAML, in one line of ASCII.

    That is JSON but for characters beyond 16 bits: JSON escapes their two halves, which YAML would not join."""
    def joined(halves: re.Match[str]) -> str:
        character = json.loads(f'"{halves[0]}"')
        return f"\\U{ord(character):08X}"

    return re.sub(r"\\ud[89ab]..\\ud[c-f]..", joined, json.dumps(value))
