"""H_v, what the frozen tower sees in an image: computed when first needed, once, and kept in memory or in a file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from pilot_jax.config import DataConfig
from pilot_jax.data.images import pixel_values, read_image
from pilot_jax.data.llava.sample import Sample
from pilot_jax.errors import InputError
from pilot_jax.parallel.mesh import mesh_of
from pilot_jax.parallel.processes import largest, own_parts, own_rows, place_of, places
from pilot_jax.storage import RowsWriter

if TYPE_CHECKING:
    from pilot_jax.models.pretrained import PretrainedModel

AT_ONCE = 64  # images in a batch, on all devices together; but no less on each than
LEAST_ON_DEVICE = 16


class Features:
    """H_v of samples' images, [n, N, D] in the model's dtype; zeros where a sample has none.

    Of several processes, each computes and keeps what the models on its own devices read; see `bring`.
    """

    def __init__(self, model: PretrainedModel, samples: Sequence[Sample], data: DataConfig | None = None,
                 file: Path | None = None) -> None:
        """file: where they are kept; None: in memory."""
        self._model, self._data = model, data or DataConfig()
        self._images = [sample if sample.image is not None else None for sample in samples]
        self.shape = len(samples), model.config.num_image_tokens, model.config.vision.feature_size
        self.dtype = np.dtype(jnp.dtype(model.module.dtype))
        self._out: Any = np.zeros(self.shape, self.dtype) if file is None else RowsWriter(file, self.shape, self.dtype)
        self._values: Any = self._out if file is None else self._out.rows
        # In every process alike: which has what.
        self._there = np.zeros((jax.process_count(), len(samples)), bool)
        self._there[:, [image is None for image in self._images]] = True
        self._sizes: set[int] = set()  # of batches, on one device, for which a program has been compiled

    def rows(self, which: Iterable[int]) -> FeatureRows:
        return FeatureRows(self, np.asarray(list(which), np.int64))

    def read(self, rows: np.ndarray) -> np.ndarray:
        """[len(rows), N, D]; what `bring` has not brought, it does now.

        Raises:
            RuntimeError: with several processes, which must bring it together.
        """
        if not self._there[jax.process_index(), rows].all():
            if jax.process_count() > 1:
                raise RuntimeError("features are read that were not asked for")
            self.bring([rows])
        first, last = (rows[0], rows[-1] + 1) if len(rows) else (0, 0)
        if last - first == len(rows) and (np.diff(rows) == 1).all():  # consecutive: no copy
            values = self._values
            return values[first:last] if isinstance(values, np.ndarray) else np.asarray(values.part(first, last))
        return self._values[rows]

    def bring(self, wanted: Sequence[np.ndarray]) -> None:
        """Compute what is not there yet. Every process asks the same.

        Args:
            wanted: rows, for each place along the mesh's `clients` axis. With one process it does not matter which.

        Raises:
            InputError: an image cannot be read; in every process.
        """
        mesh = mesh_of(self._model.base)
        owners = [sorted(p) for p in places(mesh)]
        if jax.process_count() == 1:  # whatever is missing, shared evenly
            wanted = [np.concatenate([np.asarray(w, np.int64) for w in wanted])] * len(owners)
            missing = np.unique(wanted[0])
            missing = missing[~self._there[0, missing]]
            queues = [missing[i::len(owners)] for i in range(len(owners))]
        else:
            lacking = self._there.copy()
            queues = []
            for own, asked in zip(owners, wanted, strict=True):
                rows = np.unique(np.asarray(asked, np.int64))
                rows = rows[~lacking[own][:, rows].all(0)]
                lacking[np.ix_(np.asarray(own), rows)] = True
                queues.append(rows)
        devices = 1 if mesh is None else mesh.size
        across = devices // len(owners)  # devices that share a place
        running: tuple[list[np.ndarray], jax.Array] | None = None
        while longest := max(len(q) for q in queues):
            each = self._size(-(-longest // across), devices) * across
            batch, queues = [q[:each] for q in queues], [q[each:] for q in queues]
            computed = self._model.features(self._pixels(batch, each, across, mesh))
            if running is not None:  # the device has worked on it while these images were read
                self._keep(across, *running)
            running = batch, computed
        if running is not None:
            self._keep(across, *running)
        for own, asked in zip(owners, wanted, strict=True):
            self._there[np.ix_(np.asarray(own), np.asarray(asked, np.int64))] = True

    def _size(self, needed: int, devices: int) -> int:
        """Images of a batch on each device: few sizes, so that few programs are compiled, but for a single image not
        all of them."""
        full = max(AT_ONCE // devices, LEAST_ON_DEVICE)
        fitting = [s for s in self._sizes if s >= needed]
        size = min(fitting) if fitting else min(full, 1 << (needed - 1).bit_length())
        self._sizes.add(size)
        return size

    def _pixels(self, rows: list[np.ndarray], each: int, across: int, mesh: jax.sharding.Mesh | None) -> np.ndarray:
        """[places · each, 3, H, W]; zeros where other processes' devices see them."""
        side, fault = self._model.config.vision.image_size, None
        out = np.zeros((len(rows) * each, 3, side, side), np.float32)
        at = np.concatenate([_spread(len(own), each, across) + place * each for place, own in enumerate(rows)])
        mine = own_rows(mesh, len(out))[at]
        try:
            images = [read_image(self._images[i], self._data.limits) for i in np.concatenate(rows)[mine]]
            if images:
                out[at[mine]] = pixel_values(self._model, images, self._data.image_fit)
        except InputError as error:
            fault = error
        if largest(int(fault is not None)):
            raise fault or InputError("data.path: another process cannot read an image; it says which.")
        return out

    def _keep(self, across: int, rows: list[np.ndarray], computed: jax.Array) -> None:
        each = computed.shape[0] // len(rows)
        for start, part in own_parts(computed):
            for place in range(start // each, (start + len(part)) // each):
                at = _spread(len(rows[place]), each, across) + place * each - start
                self._out[rows[place]] = part[at]


def _spread(count: int, each: int, across: int) -> np.ndarray:
    """Where `count` images lie among `each` rows that belong to `across` devices, so that all have about as many."""
    images = np.arange(count)
    return images % across * (each // across) + images // across


class FeatureRows:
    """Some of the rows of `Features`, as an array of them."""

    def __init__(self, of: Features, which: np.ndarray) -> None:
        self.of, self.which = of, which
        self.shape, self.dtype, self.ndim = (len(which), *of.shape[1:]), of.dtype, 3

    def __len__(self) -> int:
        return len(self.which)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = self.of.read(self.which)
        return values if dtype is None else values.astype(dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """As an array's; of an array of rows, only those are read."""
        if isinstance(index, np.ndarray) and index.ndim == 1 and index.dtype.kind == "i":
            return self.of.read(self.which[index])
        return np.asarray(self)[index]

    def first(self, count: int) -> FeatureRows:
        return FeatureRows(self.of, self.which[:count])


def joined(parts: Sequence[Any]) -> Any:
    """Features of several clients as those of one."""
    if all(isinstance(p, FeatureRows) and p.of is parts[0].of for p in parts):
        return FeatureRows(parts[0].of, np.concatenate([p.which for p in parts]))
    return np.concatenate([np.asarray(p) for p in parts])


def bring(features: Sequence[Any], width: int) -> None:
    """Compute what `width` clients, side by side on the mesh, and the next `width`, are going to read. Arrays that are
    there anyhow are passed over."""
    by_source: dict[int, tuple[Features, list[list[np.ndarray]]]] = {}
    for number, rows in enumerate(features):
        if isinstance(rows, FeatureRows):
            count = len(places(mesh_of(rows.of._model.base)))
            source, wanted = by_source.setdefault(id(rows.of), (rows.of, [[] for _ in range(count)]))
            wanted[place_of(number % width, width, count)].append(rows.which)
    for source, wanted in by_source.values():
        source.bring([np.concatenate(w) if w else np.zeros(0, np.int64) for w in wanted])


def image_features(model: PretrainedModel, samples: list[Sample], data: DataConfig | None = None) -> FeatureRows:
    """H_v of each sample's image, [len(samples), N, D] in the model's dtype; zeros where a sample has none."""
    every = Features(model, samples, data).rows(range(len(samples)))
    every.of.bring([every.which] * len(places(mesh_of(model.base))))  # of several processes, in each
    return every
