"""Files of results that a second call of `compare` reads instead of computing them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pilot_jax.files import atomic_write

Record = dict[str, Any]  # a JSON object


def once(path: Path, inputs: Sequence[object], make: Callable[[], Record]) -> tuple[Record, bool]:
    """Returns (record, whether it is new): from a JSON file if that has the same inputs, else from `make`.

    Args:
        inputs: all that the record depends on, as JSON has it.
    """
    mark = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()
    done = _finished(path, mark)
    if done is not None:
        return done, False
    done = {"fingerprint": mark} | make()
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(done, indent=1))
    return done, True


def _finished(path: Path, fingerprint: str) -> Record | None:
    """Returns the result that an earlier call with the same inputs wrote, or None."""
    if not path.is_file():
        return None
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # a damaged file is computed again
        return None
    return done if isinstance(done, dict) and done.get("fingerprint") == fingerprint else None
