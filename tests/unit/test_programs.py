"""Tests that kept programs compute what new ones do, and are not used for anything that they were not compiled for."""

from __future__ import annotations

import dataclasses
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from jax.experimental.compilation_cache import compilation_cache

import pilot_jax.programs
from pilot_jax.cache import Cache, remember_in
from pilot_jax.embedded.scenarios import lazy_samples, scenario_clients, scene_samples
from pilot_jax.federation import client, phases
from pilot_jax.federation.losses import LossWeights
from pilot_jax.federation.rounds import run_round
from pilot_jax.models import generate, pretrained
from pilot_jax.parallel import devices
from pilot_jax.programs import KeptJit, _described, _NotKeepable, keep_in
from pilot_jax.runs import prepare, simulate
from pilot_jax.runs.ahead import compile_first_round
from pilot_jax.runs.events import CompileClock


@pytest.fixture
def no_jax_cache():
    """Switches JAX's compilation cache off, which the tests use, and forgets what has been loaded from it."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    jax.clear_caches()
    yield
    jax.config.update("jax_compilation_cache_dir", folder)
    compilation_cache.reset_cache()


@pytest.fixture
def store(tmp_path, no_jax_cache):
    kept = Cache(tmp_path, 2**30)
    keep_in(kept)
    yield kept
    keep_in(None)


@pytest.fixture
def clock():
    devices.compiler_options()  # asks XLA once in a process, by a program of its own, which is not to be counted
    clock = CompileClock()
    yield clock
    clock.stop()


def made(power=2.0):
    """Returns a new jitted function, as a new process would have it."""
    def scaled(x, *, power):
        return {"y": jnp.sin(x["a"]) ** power + x["b"]}

    return partial(KeptJit(scaled, static=("power",)), power=power)


X = {"a": np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4), "b": np.float32(2)}


def test_a_kept_program_gives_the_same_bits_and_is_not_compiled(store, clock):
    new = made()(X)["y"]
    assert clock.programs == 1 and len(list(store.folder.glob("*.kept"))) == 1
    kept = made()(X)["y"]
    assert clock.programs == 1
    np.testing.assert_array_equal(new, kept)
    keep_in(None)
    np.testing.assert_array_equal(made()(X)["y"], kept)


@pytest.mark.parametrize("kept", [True, False])
def test_programs_are_compiled_with_the_options_of_the_platform(store, monkeypatch, kept):
    """Only the outermost program is; JAX refuses options of one that is part of another."""
    inner = KeptJit(lambda x: jnp.exp(x) / 3)
    x = np.linspace(-3, 3, 1001, dtype=np.float32)
    seen = []
    monkeypatch.setattr(pilot_jax.programs, "compiler_options", lambda: seen.append(1) or {
        "xla_backend_optimization_level": "0"})
    keep_in(store if kept else None)
    out = KeptJit(lambda x: jnp.log1p(inner(x)) * jnp.sin(x))(x)
    np.testing.assert_allclose(out, np.log1p(np.exp(x) / 3) * np.sin(x), atol=1e-5)
    assert seen == [1]


def test_options_that_xla_lacks_are_left_out(monkeypatch):
    assert devices.compiler_options() == devices.COMPILE_FAST
    monkeypatch.setattr(devices, "COMPILE_FAST", {"xla_cpu_no_such_option": "1"})
    devices._knows_compile_fast.cache_clear()
    assert devices.compiler_options() == {}
    monkeypatch.undo()
    devices._knows_compile_fast.cache_clear()
    monkeypatch.setattr(devices, "platform", lambda: "gpu")
    assert devices.compiler_options() == {}


@pytest.mark.parametrize("changed", [
    lambda: made(3.0)(X), lambda: made(2)(X), lambda: made()(X | {"a": X["a"][:2]}),
    lambda: made()(X | {"a": X["a"].astype(np.float16)}), lambda: made()(X | {"b": 2.0}),
    lambda: made()(X | {"c": X["b"]}), lambda: made()(jax.device_put(X, jax.devices()[-1]))])
def test_another_call_is_compiled_for_itself(store, clock, changed):
    made()(X)
    before = clock.programs
    changed()
    assert clock.programs > before


@pytest.mark.parametrize("surroundings", ["another version", "another machine"])
def test_a_program_of_other_surroundings_is_not_used(store, clock, monkeypatch, surroundings):
    made()(X)
    monkeypatch.setattr(pilot_jax.programs, "surroundings", lambda: surroundings)
    made()(X)
    assert clock.programs == 2


@pytest.mark.parametrize("content", [b"", b"nonsense", pickle.dumps(1), pickle.dumps(([0], b"nonsense", None, None)),
                                     pickle.dumps(([99], b"nonsense", None, None))])
def test_what_is_no_program_is_compiled_and_written_again(store, clock, monkeypatch, content):
    keys = []
    monkeypatch.setattr(Cache, "read", lambda self, key, read=Cache.read: keys.append(key) or read(self, key))
    right = made()(X)["y"]
    store.write(keys[0], [content])
    np.testing.assert_array_equal(made()(X)["y"], right)
    assert clock.programs == 2
    np.testing.assert_array_equal(made()(X)["y"], right)  # it is whole again
    assert clock.programs == 2 and keys == keys[:1] * 3


def test_descriptions_differ_where_values_do():
    @dataclasses.dataclass(frozen=True)
    class Foreign:
        x: int

    values = [1, 1.0, True, "1", None, (1,), (1.0,), ((1,),), (1, 1), np.dtype("float32"), np.dtype("int32"),
              LossWeights(0.5), frozenset({1}), phases.PLAIN_RULE]
    described = [_described(value) for value in values]
    assert len(set(described)) == len(values)
    for value in (lambda: 1, Foreign(1), (1, Foreign(1)), [1], object()):
        with pytest.raises(_NotKeepable):
            _described(value)


def test_a_function_with_a_foreign_argument_runs_and_is_not_kept(store):
    def applied(x, *, function):
        return function(x)

    out = KeptJit(applied, static=("function",))(np.float32(3), function=jnp.square)
    assert out == 9 and not list(store.folder.glob("*.kept"))


def test_a_program_with_a_decomposition_is_not_kept(store, clock):
    """JAX sets the pointers to LAPACK when it lowers such a program, and a process that loads it would crash."""
    for name, function in (("qr", lambda x: jnp.linalg.qr(x)[0]), ("svd", lambda x: jnp.linalg.svd(x)[1]),
                           ("sum", lambda x: jnp.sum(x))):
        KeptJit(function)(X["a"])
        assert len(list(store.folder.glob("*.kept"))) == (name == "sum"), name


def test_a_program_is_compiled_ahead_from_shapes(store, clock):
    function = made()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), X)
    function.func.compile_ahead(shapes, power=2.0)
    np.testing.assert_allclose(function(X)["y"], np.sin(X["a"]) ** 2 + 2, rtol=1e-6)
    assert clock.programs == 1


def test_inside_another_program_it_is_part_of_it(store):
    function = made()
    np.testing.assert_allclose(jax.jit(lambda x: function(x)["y"] * 2)(X), 2 * (np.sin(X["a"]) ** 2 + 2), rtol=1e-6)
    assert jax.grad(lambda a: function(X | {"a": a})["y"].sum())(X["a"]).shape == (3, 4)


def test_a_program_that_fails_when_it_is_run_is_compiled(store, clock, monkeypatch):
    right, fails = made()(X)["y"], []

    def broken(*_, **__):
        def program(*_):
            fails.append(1)
            raise jax.errors.JaxRuntimeError("NOT_FOUND: Function fusion.3 not found")
        return program

    monkeypatch.setattr(pilot_jax.programs, "deserialize_and_load", broken)
    function = made()
    for _ in range(2):
        np.testing.assert_array_equal(function(X)["y"], right)
    assert clock.programs == 2 and len(fails) == 1


def test_with_a_cache_of_jax_nothing_is_kept_twice(store, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    made()(X)
    assert not list(store.folder.glob("*.kept"))


def leaves(run):
    return [leaf for state in run.population for leaf in jax.tree.leaves(state.adapters)]


@pytest.mark.slow
def test_a_run_with_a_cache_equals_one_without(tmp_path, clock, no_jax_cache):
    own = [client.local_update, generate.generate, pretrained._features]
    config = small_config(data={"digits": {"train": 6, "validation": 1, "test": 1}}, strategy={"name": "fedavg"})
    without, before = leaves(simulate.simulate(config)), clock.programs
    config = config.model_copy(update={"system": config.system.model_copy(update={"cache": str(tmp_path / "cache")})})
    try:
        for _ in range(2):
            for one, other in zip(leaves(simulate.simulate(config)), without, strict=True):
                np.testing.assert_array_equal(one, other)
            for function in own:
                function._ready.clear()  # a new process knows no programs
            before, compiled = clock.programs, clock.programs - before
        assert compiled < 10  # small ones, outside of the package's own programs
    finally:
        keep_in(None)
        remember_in(None)
    assert {folder.name for folder in (tmp_path / "cache").iterdir()} == {"programs", "samples", "features", "prepared"}


@pytest.mark.long
def test_compile_ahead_is_given_the_shapes_of_the_training(tmp_path, monkeypatch):
    ahead, trained = set(), set()

    def training(self, bound):
        if self is client.local_update:
            trained.add(self._call(bound))
        return lambda *_, **__: self.jitted(*bound.args, **bound.kwargs)

    monkeypatch.setattr(KeptJit, "compile_ahead", lambda self, *a, **k: ahead.add(self._call(self._bound(a, k))))
    monkeypatch.setattr(KeptJit, "_program", training)
    setup = prepare.prepare(small_config(system={"length_spread": 1.0}))
    state = prepare.initial_state(setup.federation)
    compile_first_round(setup, state)
    keep_in(Cache(tmp_path, 2**30))
    try:
        run_round([setup.federation], [state], setup.executor)
    finally:
        keep_in(None)
    assert ahead == trained and len(ahead) > 2


def test_lazy_samples_are_the_samples():
    specs = scenario_clients("b", 3, 1, 2)
    plain = list(scene_samples(specs, 5))
    drawn = list(lazy_samples(specs, 5))
    known = list(lazy_samples(specs, 5, [[list(turn) for turn in sample.turns] for sample in plain]))
    for one, two, three in zip(plain, drawn, known, strict=True):
        image = np.asarray(one.image)
        for other in (two, three):
            assert dataclasses.replace(other, image=None) == dataclasses.replace(one, image=None)
            np.testing.assert_array_equal(np.asarray(other.image.draw()), image)
        assert two.image.name == three.image.name
    assert len({sample.image.name for sample in drawn}) == len(plain)
    other = next(lazy_samples(scenario_clients("b", 3, 1, 2, heterogeneity=0.5), 5))
    assert other.image.name not in {sample.image.name for sample in drawn[1:]}


def test_names_are_part_of_a_description_but_for_flax_modules(tiny):
    named = dataclasses.make_dataclass("Named", [("name", str)], frozen=True)
    named.__module__ = "pilot_jax.somewhere"
    assert _described(named("a")) != _described(named("b"))
    module = tiny[1].module
    assert _described(module) == _described(module.clone(name="other")) != _described(module.clone(lora_scale=2.0))
