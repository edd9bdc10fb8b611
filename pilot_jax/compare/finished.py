"""Files of results that a second call of `compare` reads instead of computing them again."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pilot_jax.files import atomic_write

Record = dict[str, Any]  # a JSON object


def once(path: Path, inputs: Sequence[object], make: Callable[[], Record]) -> tuple[Record, bool]:
    """Returns (record, whether it is new): from a JSON file if that has the same inputs, else from `make`.

    A record of other inputs, which may have taken hours, is not overwritten: it goes to the folder `earlier` beside the
    file, and is found there if these inputs are asked for again.

    Args:
        inputs: all that the record depends on, as JSON has it.
    """
    mark = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    for file in (path, _earlier(path, mark)):
        if (done := _finished(file)) is not None and done["fingerprint"] == mark:
            return done, False
    done = {"fingerprint": mark} | make()
    path.parent.mkdir(parents=True, exist_ok=True)
    if (other := _finished(path)) is not None:
        aside = _earlier(path, other["fingerprint"])
        aside.parent.mkdir(exist_ok=True)
        os.replace(path, aside)
    atomic_write(path, json.dumps(done, indent=1))
    return done, True


def _earlier(path: Path, fingerprint: str) -> Path:
    return path.parent / "earlier" / f"{path.stem}-{fingerprint[:12]}.json"


def _finished(path: Path) -> Record | None:
    """Returns the record that an earlier call wrote to a file; None if there is none, or only a damaged one."""
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    known = isinstance(done, dict) and re.fullmatch("[0-9a-f]{64}", str(done.get("fingerprint")))
    return done if known else None
