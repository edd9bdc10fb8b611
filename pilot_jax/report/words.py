"""Says numbers in words: counts with their plurals, scores, changes, and lists of names."""

from __future__ import annotations

from collections.abc import Sequence

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def counted(count: int, noun: str, plural: str = "") -> str:
    """Returns a count with its noun, such as "1 round" or "1,200 rounds"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


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


def duration(seconds: float) -> str:
    """Returns a time in the unit that suits it, such as "0.4 s", "12 s", "3.5 min" or "2.1 h"."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Returns a number of bytes in the unit that suits it, such as "950 B", "16.1 MB" or "1.88 GB"."""
    for unit, of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * of:
            return f"{count / of:.3g} {unit}" if count < 999.5 * of else f"{count / of:,.0f} {unit}"
    return f"{count:,.0f} B"
