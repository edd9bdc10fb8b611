"""Image features H_v, the output of the frozen vision tower: computed once, when needed, and stored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from pilot_jax.cache import Cache
from pilot_jax.config import DataConfig
from pilot_jax.data.images import FITS, check_shape, image_identity, pixel_values, read_image
from pilot_jax.data.llava.sample import Sample
from pilot_jax.errors import InputError
from pilot_jax.models.checkpoints.processors import processor_files
from pilot_jax.parallel.mesh import mesh_of
from pilot_jax.parallel.processes import largest_of_all, own_parts, own_rows, place_of, places, to_host
from pilot_jax.programs import surroundings
from pilot_jax.storage import Rows, RowsWriter

if TYPE_CHECKING:
    from pilot_jax.models.pretrained import PretrainedModel

BATCH = 64  # images in a full batch, on all devices together
LEAST_ON_DEVICE = 16  # images of a full batch on each device at least, even if the batch exceeds BATCH then


class Features:
    """The features H_v of samples' images, [n, N, D] in the model's dtype; zeros for a sample without an image.

    For a language model alone, N and D are 0.
    With several processes, each one computes and stores the features that the models on its own devices read; see
    `compute`.
    """

    def __init__(self, model: PretrainedModel, samples: Sequence[Sample], data: DataConfig | None = None,
                 file: Path | None = None, kept: Cache | None = None, least: int = 1) -> None:
        """Prepares the storage of the features, which are computed later.

        Args:
            file: the file in which the features are stored; None: in memory.
            kept: a cache that may have the features of the same images, and keeps them, if they are in memory.
            least: images that are computed at once on each device, at least; batches of `LEAST_ON_DEVICE` give the
                digits of larger ones on CPU, those of smaller ones differ in the last.
        """
        self._model, self._data, self._least = model, data or DataConfig(), least
        self._kept = kept if file is None and jax.process_count() == 1 else None
        self._samples: list[Sample | None] = [sample if sample.image is not None else None for sample in samples]
        self.shape = len(samples), model.config.num_image_tokens, model.config.feature_size
        self.dtype = np.dtype(jnp.dtype(model.module.dtype))
        self._store: np.ndarray | RowsWriter
        self._values: np.ndarray | Rows
        if file is None:
            self._store = self._values = np.zeros(self.shape, self.dtype)
        else:
            self._store = RowsWriter(file, self.shape, self.dtype)
            self._values = self._store.rows
        # Whether each process has stored each sample's features, [processes, n]; all processes have the same table.
        self._computed = np.zeros((jax.process_count(), len(samples)), bool)
        self._computed[:, [sample is None for sample in self._samples]] = True
        self._batch_sizes: set[int] = set()  # images on one device, for which a program has been compiled

    @property
    def bytes_in_memory(self) -> int:
        """The size of the features; 0 if they are on disk."""
        return self._values.nbytes if isinstance(self._values, np.ndarray) else 0

    @property
    def places(self) -> int:
        """The number of places along the `clients` axis of the mesh on which the model lies."""
        return len(places(mesh_of(self._model.base)))

    def rows(self, indices: Iterable[int]) -> FeatureRows:
        """Returns the features of the samples with these indices, without computing them."""
        return FeatureRows(self, np.asarray(list(indices), np.int64))

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the features of the samples `indices`, [len(indices), N, D], and computes those that are missing.

        Raises:
            RuntimeError: features are missing, and there are several processes, which must compute them together.
        """
        if not self._computed[jax.process_index(), indices].all():
            if jax.process_count() > 1:
                raise RuntimeError("Features are read for which `compute_features` was not called.")
            self.compute([indices])
        first, stop = (indices[0], indices[-1] + 1) if len(indices) else (0, 0)
        if stop - first == len(indices) and (np.diff(indices) == 1).all():  # consecutive: no copy
            values = self._values
            return values[first:stop] if isinstance(values, np.ndarray) else np.asarray(values.part(first, stop))
        return self._values[indices]

    def compute(self, by_place: Sequence[np.ndarray]) -> None:
        """Computes the features that are missing. With several processes, all must call this with the same arguments.

        Args:
            by_place: the indices of the samples that are read at each place along the mesh's axis `clients`. With one
                process, the features are the same whichever place an index is given for.

        Raises:
            InputError: an image cannot be read; every process raises it.
        """
        # Only the first computation looks into the cache, and fills it if it computes everything: in parts, batches of
        # other sizes may give other last digits.
        mesh, kept, self._kept = mesh_of(self._model.base), self._kept, None
        key = "" if kept is None else self._key()
        if kept is not None and key and self._take(kept.read(key)):
            return
        owners = [sorted(processes) for processes in places(mesh)]
        if jax.process_count() == 1:
            by_place = [np.concatenate([np.asarray(p, np.int64) for p in by_place])] * len(owners)
        queues = self._missing(owners, by_place)
        devices = 1 if mesh is None else mesh.size
        devices_at_place = devices // len(owners)
        running: tuple[list[np.ndarray], jax.Array] | None = None
        while longest := max(len(queue) for queue in queues):
            size = self._batch_size(-(-longest // devices_at_place), devices) * devices_at_place
            batch, queues = [queue[:size] for queue in queues], [queue[size:] for queue in queues]
            computed = self._model.features(self._pixels(batch, size, devices_at_place, mesh))
            if running is not None:  # the devices computed it while the images of this batch were read
                self._store_batch(devices_at_place, *running)
            running = batch, computed
        if running is not None:
            self._store_batch(devices_at_place, *running)
        for own, indices in zip(owners, by_place, strict=True):
            self._computed[np.ix_(np.asarray(own), np.asarray(indices, np.int64))] = True
        if self._computed.all():
            self._samples = [None] * len(self._samples)  # generated images need memory
            if kept is not None and key:
                assert isinstance(self._values, np.ndarray)
                kept.write(key, [self._values.reshape(-1).view(np.uint8).data])

    def _key(self) -> str:
        """Returns the key of these features in the cache; "" if there is none, nothing is missing, or images pass a
        function of the user's."""
        if self._computed.all() or self._data.image_fit in FITS:
            return ""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(to_host(self._model.base["vision_tower"])):
            digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
        try:
            for sample in self._samples:
                digest.update(b"-" if sample is None else image_identity(sample))
            for file in processor_files(self._model.image_directory or Path()):
                digest.update(file.read_bytes())
        except OSError:  # reading the image will say what is wrong
            return ""
        return (f"features {surroundings()} {self._model.config.vision} {self.shape} {self.dtype} "
                f"{self._data.image_fit} {digest.hexdigest()}")

    def _take(self, content: memoryview | None) -> bool:
        """Takes over the features from the cache; returns whether it has them."""
        if content is None or content.nbytes != np.prod(self.shape) * self.dtype.itemsize:
            return False
        self._store = self._values = np.frombuffer(content, self.dtype).reshape(self.shape)
        self._computed[:] = True
        self._samples = [None] * len(self._samples)
        return True

    def _missing(self, owners: list[list[int]], by_place: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the indices of the samples to compute at each place.

        With one process, the missing samples are divided evenly. With several, each place computes the samples that its
        owners, the processes that have a device there, have not stored yet.
        """
        if jax.process_count() == 1:
            missing = np.unique(by_place[0])
            missing = missing[~self._computed[0, missing]]
            return [missing[i::len(owners)] for i in range(len(owners))]
        computed, queues = self._computed.copy(), []
        for own, wanted in zip(owners, by_place, strict=True):
            indices = np.unique(np.asarray(wanted, np.int64))
            indices = indices[~computed[own][:, indices].all(0)]
            computed[np.ix_(np.asarray(own), indices)] = True
            queues.append(indices)
        return queues

    def _batch_size(self, needed: int, devices: int) -> int:
        """Returns the number of images on each device: at least `needed`, but no more than those of a full batch.

        There are only a few sizes, so that few programs are compiled. Some of them are small, so that a single image is
        not padded to a full batch.
        """
        full = max(BATCH // devices, LEAST_ON_DEVICE)
        fitting = [size for size in self._batch_sizes if size >= needed]
        size = min(fitting) if fitting else min(full, max(self._least, 1 << (needed - 1).bit_length()))
        self._batch_sizes.add(size)
        return size

    def _pixels(self, batch: list[np.ndarray], size: int, devices_at_place: int,
                mesh: jax.sharding.Mesh | None) -> np.ndarray:
        """Returns the pixel values of a batch, float32 [places · size, 3, H, W].

        Rows on other processes' devices, and padding rows, are zeros.
        """
        side, fault = self._model.config.tower.image_size, None
        out = np.zeros((len(batch) * size, 3, side, side), np.float32)
        row = np.concatenate([_positions(len(indices), size, devices_at_place) + place * size
                              for place, indices in enumerate(batch)])
        is_own = own_rows(mesh, len(out))[row]
        try:
            samples = [self._samples[i] for i in np.concatenate(batch)[is_own]]
            images = [read_image(sample, self._data.limits) for sample in samples if sample is not None]
            for sample, image in zip(samples, images, strict=True):
                assert sample is not None
                check_shape(sample, image, self._data.image_fit, self._data.limits, side)
            if images:
                out[row[is_own]] = pixel_values(self._model, images, self._data.image_fit)
        except InputError as error:
            fault = error
        if largest_of_all(int(fault is not None)):
            raise fault or InputError("data.path: another process cannot read an image; its message says which.")
        return out

    def _store_batch(self, devices_at_place: int, batch: list[np.ndarray], computed: jax.Array) -> None:
        """Stores those rows of `computed`, [places · size, N, D], that are on this process's devices."""
        size = computed.shape[0] // len(batch)
        for start, part in own_parts(computed):
            for place in range(start // size, (start + len(part)) // size):
                rows = _positions(len(batch[place]), size, devices_at_place) + place * size - start
                self._store[batch[place]] = part[rows]


def _positions(count: int, size: int, devices: int) -> np.ndarray:
    """Returns the rows, out of `size`, for `count` images, such that all `devices` get about equally many."""
    images = np.arange(count)
    return images % devices * (size // devices) + images // devices


class FeatureRows:
    """An array-like [n, N, D] of the features of some samples, which are read or computed on access."""

    def __init__(self, source: Features, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices
        self.shape, self.dtype, self.ndim = (len(indices), *source.shape[1:]), source.dtype, 3

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def nbytes(self) -> int:
        """The size in bytes of these rows as an array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        values = self.source.read(self.indices)
        return values if dtype is None else values.astype(dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """Indexes as an array does; with a one-dimensional integer array, only the rows that it names are read."""
        if isinstance(index, np.ndarray) and index.ndim == 1 and index.dtype.kind == "i":
            return self.source.read(self.indices[index])
        return np.asarray(self)[index]

    def first(self, count: int) -> FeatureRows:
        """Returns the first `count` rows, without reading them."""
        return FeatureRows(self.source, self.indices[:count])

    def take(self, rows: np.ndarray) -> FeatureRows:
        """Returns the rows with the numbers `rows`, int [m], without reading them."""
        return FeatureRows(self.source, self.indices[rows])


def concatenate_features(parts: Sequence[np.ndarray | FeatureRows]) -> np.ndarray | FeatureRows:
    """Returns the features of several clients, one after another; nothing is read if all have the same source."""
    rows = [part for part in parts if isinstance(part, FeatureRows)]
    if len(rows) == len(parts) and all(part.source is rows[0].source for part in rows):
        return FeatureRows(rows[0].source, np.concatenate([part.indices for part in rows]))
    return np.concatenate([np.asarray(part) for part in parts])


def compute_features(features: Sequence[np.ndarray | FeatureRows], width: int) -> None:
    """Computes the features that models are about to read, as far as they are missing.

    With several processes, all must call this with the same arguments before they read any of the features.

    Args:
        features: the features that each model reads, in the order in which the models are stacked, `width` at a time,
            along the mesh's axis `clients`. Plain arrays are skipped, because they need no computing.
        width: the number of models that run side by side.

    Raises:
        InputError: an image cannot be read.
    """
    by_source: dict[int, tuple[Features, list[list[np.ndarray]]]] = {}
    for number, rows in enumerate(features):
        if isinstance(rows, FeatureRows):
            source, by_place = by_source.setdefault(
                id(rows.source), (rows.source, [[] for _ in range(rows.source.places)]))
            by_place[place_of(number % width, width, len(by_place))].append(rows.indices)
    for source, by_place in by_source.values():
        source.compute([np.concatenate(p) if p else np.zeros(0, np.int64) for p in by_place])


def image_features(model: PretrainedModel, samples: Sequence[Sample], data: DataConfig | None = None) -> FeatureRows:
    """Returns H_v of each sample's image, [len(samples), N, D] in the model's dtype; zeros for one without an image.

    With several processes, each of them computes all features.
    """
    rows = Features(model, samples, data).rows(range(len(samples)))
    rows.source.compute([rows.indices] * rows.source.places)
    return rows
