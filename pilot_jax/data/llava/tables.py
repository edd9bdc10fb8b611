"""Reads Parquet files and Hugging Face `datasets` folders, memory-mapped; images stay encoded until they are needed."""

from __future__ import annotations

import atexit
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pilot_jax.data.llava.image_field import StoredImage
from pilot_jax.errors import InputError


def _tables(path: Path) -> dict[str, Any]:
    """Returns the tables in a file or folder by split; the split of a single table is ""."""
    try:
        import datasets
    except ImportError:
        raise InputError(f"{path}: reading it needs the library datasets (of the extra 'data'), which is not "
                         "installed. Run: pip install datasets") from None
    datasets.disable_progress_bars()
    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(str(path))
        else:
            cache = tempfile.TemporaryDirectory(prefix="pilot-jax-")
            atexit.register(cache.cleanup)
            loaded = datasets.Dataset.from_parquet(str(path), cache_dir=cache.name)
    except Exception as error:  # datasets raises many kinds, pyarrow's among them
        raise InputError(f"{path}: cannot be read as a table ({error}). Write the file again.") from None
    return dict(loaded) if isinstance(loaded, dict) else {"": loaded}


def _turns(raw: Any) -> Any:
    """Returns a list of turns; older releases of `datasets` give a struct of lists instead of a list of structs."""
    if isinstance(raw, dict) and raw and all(isinstance(column, list) for column in raw.values()):
        return [dict(zip(raw, values, strict=True)) for values in zip(*raw.values(), strict=True)]
    return raw


def table_values(path: Path) -> Iterator[tuple[str, object, str]]:
    """Yields (place for messages, sample as a dict, split or "") of each row of all tables in a file or folder.

    Raises:
        InputError: `datasets` is not installed, or cannot read the file.
    """
    yield from tables_rows(_tables(path), str(path))


def tables_rows(tables: Mapping[str, Any], name: str) -> Iterator[tuple[str, object, str]]:
    """Yields what `table_values` does, of tables in memory: `datasets.Dataset` by split; "" for a table without one."""
    for split, table in tables.items():
        table = _encoded(table)
        for row in range(len(table)):
            value = dict(table[row])
            value |= {key: _turns(value.get(key)) for key in ("conversations", "messages")}
            for key, one in (("image", value.get("image")), ("images", value.get("images"))):
                alone = one[0] if key == "images" and isinstance(one, list) and len(one) == 1 else one
                if isinstance(alone, dict):
                    stored = alone.get("bytes") is not None
                    value[key] = StoredImage(table, row, key) if stored else alone.get("path")
            yield (f"{name}{f' ({split})' if split else ''}[{row}]", value,
                   {"val": "validation"}.get(str(split), str(split)))


def _encoded(table: Any) -> Any:
    """Returns the table with its columns `image` and `images` as encoded files, which are not decoded on reading."""
    import datasets

    plain = datasets.Image(decode=False)
    features = table.features
    if isinstance(features.get("image"), datasets.Image):
        table = table.cast_column("image", plain)
    of_list = getattr(features.get("images"), "feature", None)
    if isinstance(of_list, datasets.Image):
        table = table.cast_column("images", type(features["images"])(plain))
    return table
