"""Tests that each image passes the vision tower once, when first needed, and that its features are the tower's."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from conftest import small_config

import pilot_jax
from pilot_jax.cache import Cache
from pilot_jax.config import DataConfig
from pilot_jax.data import features as features_module
from pilot_jax.data.features import (
    FeatureRows,
    Features,
    compute_features,
    concatenate_features,
    image_features,
)
from pilot_jax.data.images import image_identity, pixel_values
from pilot_jax.data.llava.image_field import DrawnImage
from pilot_jax.errors import InputError
from pilot_jax.federation import rounds
from pilot_jax.runs import ahead, prepare


@pytest.fixture(scope="module")
def model():
    return pilot_jax.load()


@pytest.fixture(scope="module")
def samples():
    chosen = prepare.load_samples(small_config())[:20]
    chosen[3] = dataclasses.replace(chosen[3], image=None)
    return chosen


@pytest.fixture
def seen(monkeypatch):
    """The ids of the samples whose images have been read, in order."""
    ids, read = [], features_module.read_image

    def reading(sample, limits):
        ids.append(sample.id)
        return read(sample, limits)

    monkeypatch.setattr(features_module, "read_image", reading)
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("on_disk", [False, True])
def test_once_and_only_what_is_asked_for(model, samples, seen, tmp_path, on_disk):
    features = Features(model, samples, file=tmp_path / "features" if on_disk else None)
    first, second = features.rows(range(2, 9)), features.rows([12, 5, 3])
    assert not seen
    np.asarray(features.rows([15]))  # computed on access, without a call of `compute_features`
    assert seen == [samples[15].id] and not compute_features([features.rows([15])], 1) and seen.pop()
    compute_features([first], 1)
    assert seen == [samples[i].id for i in (2, 4, 5, 6, 7, 8)]  # 3 has no image
    compute_features([second, first, np.zeros(3)], 2)
    assert seen[6:] == [samples[12].id]
    for rows in (first, second):
        got = np.asarray(rows)
        shown = [k for k, i in enumerate(rows.indices) if i != 3]
        expected = model.features(pixel_values(model, [samples[rows.indices[k]].image for k in shown]))
        np.testing.assert_allclose(got[shown], expected, atol=1e-5)
        assert got.shape == rows.shape and not got[[k for k, i in enumerate(rows.indices) if i == 3]].any()
        assert (rows[np.asarray([1, 0, 1])] == got[[1, 0, 1]]).all() and (rows[1] == got[1]).all()
        assert (np.asarray(rows.first(2)) == got[:2]).all()
    joint = concatenate_features([first, second])
    assert isinstance(joint, FeatureRows) and (np.asarray(joint)[7:] == np.asarray(second)).all()


def test_one_image_is_a_batch_of_one(model, samples):
    """A single image is not padded to a batch of 64, and remainders do not compile programs of their own."""
    features = Features(model, samples * 5)
    compute_features([features.rows([7])], 1)
    assert features._batch_sizes == {1}
    compute_features([features.rows(range(100))], 1)
    compute_features([features.rows([0, 1, 2])], 1)
    assert features._batch_sizes == {1, 64}


def test_a_broken_image(model, samples, tmp_path):
    """The error names the image, and features that were computed before remain."""
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not really")
    bad = dataclasses.replace(samples[1], image=tmp_path / "broken.png")
    features = Features(model, [samples[0], bad])
    compute_features([features.rows([0])], 1)
    with pytest.raises(InputError, match=r"broken\.png cannot be decoded"):
        compute_features([features.rows([1])], 1)
    assert np.asarray(features.rows([0])).any()


@pytest.mark.slow
def test_a_population_on_disk_is_seen_when_drawn(tmp_path, seen):
    """With clients on disk, a round reads only its cohort's training images. In memory, all images are read at once."""
    config = small_config(federation={"rounds": 1, "clients_per_round": 2}, system={"store": str(tmp_path)})
    setup = prepare.prepare(config)
    fed = setup.federation
    ahead.compute_all_features(setup)
    assert not seen
    state, = rounds.run_round([fed], [prepare.initial_state(fed)], setup.executor)
    trained = [c for c, s in zip(fed.clients, state.population, strict=True) if not s.is_new]
    assert len(trained) == 2
    assert sorted(seen) == sorted(s.id for s in prepare.load_samples(config)
                                  if s.split == "train" and s.client in [c.name for c in trained])
    seen.clear()
    ahead.compute_all_features(prepare.prepare(small_config()))
    assert sorted(seen) == sorted(s.id for s in prepare.load_samples(config))


def test_image_features_of_a_list(model, samples):
    every = image_features(model, samples)
    assert every.shape == (20, *np.asarray(every).shape[1:]) and not np.asarray(every)[3].any()


@pytest.fixture
def kept(tmp_path):
    (tmp_path / "kept").mkdir()
    return Cache(tmp_path / "kept", 2**24)


def all_of(features):
    compute_features([features.rows(range(20))], 1)
    return np.array(features.rows(range(20)))


def test_kept_features_are_read_and_no_image_is(model, samples, seen, kept):
    new = all_of(Features(model, samples, kept=kept))
    assert len(seen) == 19
    np.testing.assert_array_equal(all_of(Features(model, samples, kept=kept)), new)
    assert len(seen) == 19


@pytest.mark.parametrize("change", ["image", "order", "fit", "tower", "damage"])
def test_features_of_other_images_or_of_another_tower_are_computed(model, samples, seen, kept, change):
    before = all_of(Features(model, samples, kept=kept))
    seen.clear()
    data = DataConfig(image_fit="pad") if change == "fit" else DataConfig()
    if change == "image":
        samples = [*samples[:-1], dataclasses.replace(samples[-1], image=samples[-2].image)]
    if change == "order":
        samples = samples[::-1]
    if change == "tower":
        tower = jax.tree.map(lambda x: x * 1.01, model.base["vision_tower"])
        model = dataclasses.replace(model, base={**model.base, "vision_tower": tower})
    if change == "damage":
        file, = kept.folder.glob("*.kept")
        file.write_bytes(file.read_bytes()[:-1])
    after = all_of(Features(model, samples, data, kept=kept))
    assert len(seen) == 19 and (change in ("fit", "damage")) == bool((after == before).all())
    np.testing.assert_array_equal(after, all_of(Features(model, samples, data)))


def test_features_computed_in_parts_are_not_kept(model, samples, kept):
    """Batches of other sizes may round differently, and a second run shall compute what the first one has."""
    features = Features(model, samples, kept=kept)
    compute_features([features.rows(range(5))], 1)
    all_of(features)
    assert not list(kept.folder.glob("*.kept"))


@pytest.mark.parametrize("kind", ["file", "drawn", "memory"])
def test_images_differ_in_their_identity(samples, tmp_path, kind):
    def sample(number):
        image = samples[number].image
        if kind == "file":
            image.save(tmp_path / f"{number}.png")
            image = tmp_path / f"{number}.png"
        if kind == "drawn":
            image = DrawnImage(str(number), lambda: image)
        return dataclasses.replace(samples[0], image=image)

    one, other = sample(0), sample(1)
    assert image_identity(one) == image_identity(sample(0)) != image_identity(other)
    assert image_identity(dataclasses.replace(one, image=None)) == b""
