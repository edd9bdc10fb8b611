"""Tests of projectors of a user's own: what they compute, what they survive, and what refuses them."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config

import pilot_jax
from pilot_jax.errors import InputError
from pilot_jax.evaluation.personalised import evaluate
from pilot_jax.models.projectors import PROJECTORS
from pilot_jax.planning.estimate import make_plan
from pilot_jax.programs import _described, _NotKeepable
from pilot_jax.runs import prepare

KEYS = {"model": {"projector": "linear"}, "strategy": {"name": "fedavg"}}


class Linear:
    """One linear layer."""

    def init(self, key, d, c):
        return {"kernel": jax.random.normal(key, (d, c)) / d**0.5}

    def __call__(self, parameters, features):
        return features @ parameters["kernel"].astype(features.dtype)


@pytest.fixture(autouse=True)
def registered():
    pilot_jax.projector("linear")(Linear)
    yield
    PROJECTORS.clear()


def test_the_model_computes_it():
    setup = prepare.prepare(small_config(**KEYS))
    model, rng = setup.federation.model, np.random.default_rng(0)
    spec = model.config
    features = rng.normal(size=(2, spec.num_image_tokens, spec.feature_size)).astype(np.float32)
    ids = np.full((2, spec.num_image_tokens), spec.image_token_id)
    x, aux = model.module.apply({"params": {"decoder": model.base["decoder"]},
                                 "connector": {"connector": {"projector": model.base["projector"]}}},
                                ids, jnp.asarray(features), "plain", method="embed")
    kernel = np.float64(model.base["projector"]["kernel"])
    assert kernel.shape == (spec.feature_size, spec.text.hidden_size) and aux == {}
    np.testing.assert_allclose(x, np.float64(features) @ kernel, atol=1e-4)
    # A kept program would know nothing of a change of the class.
    with pytest.raises(_NotKeepable):
        _described(model.module)


@pytest.mark.long
def test_a_run_its_resumption_and_its_scores(tmp_path, call):
    config = small_config(**KEYS)
    run = pilot_jax.simulate(config, out=tmp_path / "run")
    trained = run.population[0].adapters["projector"]["kernel"]
    start = prepare.prepare(config).federation.model.base["projector"]["kernel"]
    assert np.abs(trained - np.asarray(start)).max() > 1e-4
    back = pilot_jax.restore(tmp_path / "run")
    assert evaluate(back.evaluation, back.population) == run.summary["score_by_client"]
    code, _, err = call("export", tmp_path / "run", "--client", "vqa_0", "--out", tmp_path / "out")
    assert code == 2 and "--out: the run has a projector of your own (linear)" in err
    code, _, err = call("report", tmp_path / "run", "--questions", 0)
    assert code == 0, err
    PROJECTORS.clear()  # as another process, which has not imported the class
    code, _, err = call("evaluate", tmp_path / "run")
    assert code == 2 and "model.projector: 'linear' is not known" in err and "--use MODULE" in err
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["strategy"] == "fedavg"


def test_the_plan_counts_it():
    config = small_config(**KEYS)
    d, c = (prepare.outline(config).spec.feature_size, prepare.outline(config).spec.text.hidden_size)
    assert make_plan(config)["parameters"]["projector"] == d * c


def test_pilot_and_wrong_shapes_refuse_it():
    with pytest.raises(InputError, match=r"model\.projector: pilot trains adapters of its own"):
        prepare.prepare(small_config(model=KEYS["model"]))

    @pilot_jax.projector("half")
    class Half(Linear):
        def __call__(self, parameters, features):
            return super().__call__(parameters, features)[:, ::2]

    with pytest.raises(InputError, match=r"model\.projector: features .* expected \["):
        prepare.prepare(small_config(**KEYS | {"model": {"projector": "half"}}))
    with pytest.raises(InputError, match=r"'linaer' is not known\. Did you mean 'linear'"):
        prepare.prepare(small_config(**KEYS | {"model": {"projector": "linaer"}}))
    assert dataclasses.is_dataclass(prepare.outline(small_config()).spec)
