"""Shared fixtures: small random checkpoints written by transformers, a small federation, and observers of runs."""

# ruff: noqa: E402  # the import hook must be installed before the package is imported

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PILOT_JAX_KEEP", "0")  # tests replace functions, of which a kept program would know nothing
# Compiling is most of the tests' time. All test processes, and the processes that tests start, share one folder of
# compiled programs, which the next run of the tests uses again; `make clean` removes it.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / "build" / "programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**31))  # with a limit, JAX locks what it reads and writes

import jaxtyping

# This must come before the first import of the package. In these modules, every call checks shapes and dtypes against
# the annotations. Modules whose annotations tests deliberately violate (such as with a toy model) are left out.
jaxtyping.install_import_hook(
    ["pilot_jax.kernels", "pilot_jax.models.connector", "pilot_jax.models.lora", "pilot_jax.models.experts",
     *(f"pilot_jax.federation.{name}" for name in ("client", "cohort", "distances", "losses", "mixing"))],
    "beartype.beartype")

import jax
import numpy as np
import pytest

import pilot_jax
from pilot_jax.config import STRATEGY_PARAMS, parse_config
from pilot_jax.evaluation.personalised import Evaluation
from pilot_jax.federation.executor import Executor
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.strategies import STRATEGIES, make_strategy
from pilot_jax.models.checkpoints import library
from pilot_jax.runs import prepare, restore, simulate
from pilot_jax.runs.events import MetricsFile
from pilot_jax.storage import Store
from pilot_jax.testing import toy
from pilot_jax.testing.checkpoints import (  # noqa: F401  # for the tests that import them from here
    IMAGE_TOKEN,
    TINY_TEXT,
    TINY_VISION,
    write_checkpoint,
    write_language_model,
    write_llava,
    write_tokenizer,
)

# Tests call the command line in their own process, which needs transformers' torch models as oracles.
library.leave_out_torch = lambda: None

QUICK = str(ROOT / "configs" / "quickstart.yaml")


class Events(RunObserver):
    """Collects the events of a run as dicts whose "kind" is note, chunk, phase (if uploads were mixed) or score."""

    def __init__(self):
        self.events = []

    def _add(self, kind, **event):
        self.events.append({"kind": kind, **event})

    def note(self, text):
        self._add("note", text=text)

    def chunk_trained(self, progress):
        self._add("chunk", **progress)

    def phase_ended(self, state, record, mixing, trained):
        if mixing is not None:
            self._add("phase", **record)

    def round_scored(self, round_, score):
        self._add("score", text=f"round {round_}: validation score {score:.3f}")


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing catches it, so nothing more is written to disk."""


def die(*_, **__):
    raise Killed


class DiesAt(Events):
    """An observer that ends the run with `Killed` at the `count`-th event of a kind."""

    def __init__(self, count, kind="chunk"):
        super().__init__()
        self.count, self.kind = count, kind

    def _add(self, kind, **event):
        super()._add(kind, **event)
        if kind == self.kind and sum(e["kind"] == kind for e in self.events) == self.count:
            die()


class Records(MetricsFile):
    """Collects the lines of metrics.jsonl in `records`, and the phases' mixing arrays by (round, phase) in `mixing`."""

    def __init__(self):
        super().__init__(None)
        self.mixing = {}

    def phase_ended(self, state, record, mixing, trained):
        super().phase_ended(state, record, mixing, trained)
        if mixing is not None:
            self.mixing[record["round"], record["phase"]] = mixing


def pytest_collection_modifyitems(items):
    """Slow tests come first, so that none of them is left to one process at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Forgets compiled programs before they exhaust a process' memory maps, which would crash XLA's compiler."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 20_000:  # Linux allows 65,530
        jax.clear_caches()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Returns (torch model, pilot_jax model) of one tiny random checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    return write_llava(folder), pilot_jax.load(folder)


def small_config(**sections):
    """Returns a config that is small enough for a test: the embedded base model, few scenes, few steps."""
    raw = {
        "model": {"lora": {"rank": 4, "alpha": 8}},
        "data": {"template": "vicuna_short", "digits": {"train": 10, "validation": 2, "test": 2}},
        "federation": {"rounds": 1, "local_steps": 2},
        "train": {"batch_size": 4},
        "eval": {"max_new_tokens": 4, "batch_size": 2},
        # One short program for all tasks, since compilation takes most of a test's time.
        "system": {"length_spread": 4.0, "unroll": 1},
    }
    for name, section in sections.items():
        for key, value in section.items():
            old = raw.setdefault(name, {}).get(key)
            raw[name][key] = {**old, **value} if isinstance(old, dict) else value
    return parse_config(raw)


@pytest.fixture(scope="session")
def setup():
    """Returns the `Setup` of `small_config()`."""
    return prepare.prepare(small_config())


@pytest.fixture(scope="session")
def federation(setup):
    """Returns (federation, setup, initial state) of `small_config()`."""
    return setup.federation, setup, prepare.initial_state(setup.federation)


SECONDS = ("seconds", "prepare_seconds", "waited_seconds", "feature_seconds")


def _records_and_mixing(folder):
    """Returns the lines of metrics.jsonl without their times, and the contents of the mixing files."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    mixing = {}
    for file in sorted((folder / "mixing").iterdir()):
        with np.load(file) as arrays:
            mixing[file.name] = {n: arrays[n].tolist() for n in arrays.files}
    return [{k: v for k, v in line.items() if k not in SECONDS} for line in lines], mixing


def same_run(folder, other):
    """Asserts that two finished runs wrote the same, except for times."""
    one, two = (json.loads((f / "summary.json").read_text()) for f in (folder, other))
    timed = {"wall_seconds", "compile_seconds", "client_steps_per_second", "peak_memory_bytes", "memory_bytes"}
    assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in two.items() if k not in timed}
    assert _records_and_mixing(folder) == _records_and_mixing(other)
    assert not (other / "checkpoints" / "resume").exists()


def slow_except(chosen, values, slow=None):
    """Returns the values as parameters of a test: unmarked if chosen, else `slow`, or `long` if not in `slow`."""
    def mark(value):
        return pytest.mark.slow if slow is None or value in slow else pytest.mark.long

    return [value if value in chosen else
            pytest.param(*value if isinstance(value, tuple) else (value,), marks=mark(value)) for value in values]


def llava_entry(**changes):
    """Returns one entry of LLaVA JSON; a change to None removes the key."""
    entry = {"id": "1", "task": "t", "client": "c",
             "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    return {k: v for k, v in (entry | changes).items() if v is not None}


def with_image(name):
    return llava_entry(image=name,
                       conversations=[{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}])


def write(folder, name, content):
    """Writes a text as it is, or any other value as JSON, and returns the path."""
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder / name


def tree_max_difference(a, b) -> float:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return max(float(np.max(np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64))))
               for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@contextlib.contextmanager
def toy_instead_of_model(clients=None, client_chunk=2):
    """Makes `simulate` and `restore` train the toy on the clients given, whatever model and data a config names."""
    def setup(config, strategy=None, samples=None):
        if strategy is None:
            strategy = make_strategy(config.strategy, schedule=config.federation.schedule)
        else:
            config, strategy = prepare.with_own_strategy(config, strategy)
        fed = toy.toy_federation(strategy, clients, settings=config.federation, seed=config.system.seed)
        if config.system.store is not None:
            fed = dataclasses.replace(fed, store=Store(config.system.store))
        models = (0,) * len(fed.unpooled) or tuple(range(len(fed.clients)))
        evaluation = Evaluation(fed, fed.unpooled or fed.clients, models, None, {}, 2, config.data)
        return prepare.Setup(config, fed, evaluation, Executor(client_chunk), config.model, config.eval, config.system)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulate, "prepare", setup)
        patch.setattr(restore, "prepare_restored", setup)
        for place in (simulate, restore):
            patch.setattr(place, "initial_state", toy.toy_state)
        patch.setattr(restore, "initial_adapters", lambda fed: toy.toy_adapters(fed.strategy))
        yield


@pytest.fixture
def on_toy():
    """Makes runs use the toy; returns a config of them."""
    with toy_instead_of_model():
        yield parse_config({"federation": {"rounds": 2, "local_epochs": 3}, "strategy": {"name": "fedavg"}})


@pytest.fixture
def another_process():
    """Returns a function that forgets the strategies registered since the test began, as in a new process."""
    known = dict(STRATEGIES), dict(STRATEGY_PARAMS)

    def forget():
        for now, before in zip((STRATEGIES, STRATEGY_PARAMS), known, strict=True):
            now.clear()
            now.update(before)

    yield forget
    forget()


@pytest.fixture
def call(monkeypatch, capsys):
    """Returns a function that runs a command and returns (exit code, stdout, stderr)."""
    from pilot_jax import cli

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["pilot-jax", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out = capsys.readouterr()
        return caught.value.code or 0, out.out, out.err

    return run
