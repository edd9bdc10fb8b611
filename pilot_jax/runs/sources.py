"""Reads or generates the samples that `data.path` names."""

from __future__ import annotations

from pilot_jax.cache import open_cache
from pilot_jax.config import DataConfig
from pilot_jax.data.given import PREFIX
from pilot_jax.data.llava.reading import read_samples
from pilot_jax.data.llava.sample import Sample
from pilot_jax.errors import InputError
from pilot_jax.runs.generated import GENERATED

SAMPLES_KEPT = 2**28  # bytes in `system.cache`; the least recently used are removed


def source_samples(data: DataConfig, cache: str | None) -> list[Sample]:
    """Returns the samples of `data.path`; see `read_samples` for those of files.

    Args:
        cache: the value of `system.cache`.

    Raises:
        InputError: the data are wrong, or were given in Python.
    """
    if data.path.startswith(PREFIX):
        raise InputError("data.path: the samples of this run were given in Python. Pass the same again, as data=… of "
                         "pilot_jax.simulate or pilot_jax.restore.")
    if data.path in GENERATED:
        return list(GENERATED[data.path].samples(data, open_cache(cache, "samples", SAMPLES_KEPT)))
    return read_samples(data.path, data.image_root, data.file_names, data.limits)


def num_tasks(data: DataConfig) -> int:
    """Returns the number of tasks in the data of `data.path`; images are not read.

    Raises:
        InputError: see `source_samples`.
    """
    if data.path in GENERATED:
        return GENERATED[data.path].num_tasks(data)
    return len({sample.task for sample in source_samples(data, None)})
