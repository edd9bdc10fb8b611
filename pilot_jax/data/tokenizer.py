"""A tokenizer that is loaded only if something is to be encoded or decoded that no earlier run has."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pilot_jax.cache import Form, digest_of_files, remembered

Result = TypeVar("Result")
FILES = (".json", ".jinja", ".model", ".txt")  # endings of a tokenizer's files


class LateTokenizer:
    """The tokenizer of a directory; has the attributes of transformers' one, which is loaded for the first of them.

    Args:
        directory: the folder of its files, or a GGUF file.
        load: loads and checks it.
    """

    def __init__(self, directory: Path, load: Callable[[], Any]) -> None:
        self._load, self._lock, self._loaded = load, threading.Lock(), None
        files: list[Path] = []
        with contextlib.suppress(OSError):  # no such folder, or not readable: `load` says so
            files = sorted(file for file in directory.iterdir() if file.suffix in FILES)
        self.content = digest_of_files(files) if files else None  # changes if the tokenizer does; None: not known

    def loaded(self) -> Any:
        """Returns transformers' tokenizer."""
        with self._lock:
            self._loaded = self._load() if self._loaded is None else self._loaded
            return self._loaded

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of all objects, as by copy, and of some before they have any attribute
            raise AttributeError(name)
        return getattr(self.loaded(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.loaded()(*args, **kwargs)


def remembered_by(tokenizer: Any, key: str | None, form: Form[Result], compute: Callable[[], Result]) -> Result:
    """Returns what `compute` returns, or has returned in an earlier run with a `LateTokenizer` of the same content.

    Args:
        key: a text of all that the result depends on beside the tokenizer; None: nothing is kept.
        form: how the result is stored.
    """
    content = tokenizer.content if isinstance(tokenizer, LateTokenizer) else None
    return remembered(f"{content} {key}" if content and key else None, form, compute)
