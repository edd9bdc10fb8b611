"""Tests of how the clients of a phase are divided into chunks that train side by side."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from conftest import small_config, tree_max_difference

from pilot_jax.config import TrainConfig
from pilot_jax.federation import executor
from pilot_jax.federation.chunks import Job, chunks
from pilot_jax.federation.executor import Executor, Work
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.runs import prepare
from pilot_jax.testing import toy

SIZES = (30, 2, 9, 30, 1, 17, 3)  # of unequal clients, in training samples
LENGTHS = "input_ids", "attention_mask"
ANSWERS = "target_positions", "target_ids", "target_weights"


def longer(client, tokens, answers=0):
    """Returns the client with arrays padded by numbers of tokens and of answer tokens."""
    more = dict.fromkeys(LENGTHS, tokens) | dict.fromkeys(ANSWERS, answers)
    return dataclasses.replace(client, train={
        name: np.pad(array, ((0, 0), (0, more[name]))) if name in more else array
        for name, array in client.train.items()})


def federation(more_tokens, sizes=SIZES):
    """Returns a toy federation whose clients' arrays are longer by so many tokens."""
    clients = toy.toy_clients(sizes, ("t0",) * len(sizes))
    return toy.toy_federation(make_strategy("fedavg"), tuple(map(longer, clients, more_tokens)), train=TrainConfig(
        batch_size=2, lr_connector=0.1, lr_lora_stage1=0.1))


def seconds(groups):
    """Returns the time of the groups, in steps × tokens."""
    return sum(max(job.steps for job in group) * max(job.shape[0] for job in group) for group in groups)


def test_clients_of_a_chunk_have_similar_numbers_of_steps():
    """Every client is trained once; in each shape, no other division into chunks takes fewer steps in all."""
    counts = 4, 1, 2, 5, 1, 3, 1
    fed = federation([0] * 7)
    groups = chunks([Job(0, fed, c, steps) for c, steps in enumerate(counts)], 2)
    assert [[job.steps for job in group] for group in groups] == [[5, 4], [3, 2], [1, 1], [1]]
    assert sorted(job.client for group in groups for job in group) == list(range(7))
    best = min(sum(max(order[i:i + 2]) for i in range(0, 7, 2)) for order in itertools.permutations(counts))
    assert sum(group[0].steps for group in groups) == best


def test_clients_that_fill_no_chunk_join_longer_ones():
    """Three tasks of three clients on eight devices take two chunks, not three; what would take longer stays apart."""
    fed = federation([0] * 3 + [8] * 3 + [16] * 3, (4,) * 9)

    def members(width, steps):
        return [[job.client for job in group]
                for group in chunks([Job(0, fed, c, count) for c, count in enumerate(steps)], width)]

    assert members(8, [5] * 9) == [[0, 1, 2], [6, 7, 8, 3, 4, 5]]
    assert members(9, [5] * 9) == [[6, 7, 8, 3, 4, 5, 0, 1, 2]]
    assert members(2, [5] * 9) == [[0, 1], [2], [3, 4], [6, 7], [8, 5]]
    assert members(8, [100] * 3 + [10] * 3 + [1] * 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_joined_chunks_never_take_longer_and_are_the_same_after_a_part():
    rng = np.random.default_rng(0)
    for _ in range(100):
        count, width = int(rng.integers(1, 16)), int(rng.integers(1, 9))
        fed = federation(8 * rng.integers(0, 4, count), (2,) * count)
        jobs = [Job(0, fed, client, int(rng.integers(1, 20))) for client in range(count)]
        groups = chunks(jobs, width)
        apart = [group for shape in sorted({job.shape for job in jobs})
                 for group in chunks([job for job in jobs if job.shape == shape], width)]
        assert seconds(groups) <= seconds(apart) and max(map(len, groups)) <= width
        assert sorted(job.client for group in groups for job in group) == list(range(count))
        done = {job.client for group in groups[:int(rng.integers(0, len(groups) + 1))] for job in group}
        assert chunks([job for job in jobs if job.client not in done], width) == [
            group for group in groups if group[0].client not in done]


def as_named(jobs, width):
    """Clients of a shape in the order of their names, as many as fit."""
    by_shape = {shape: [job for job in jobs if job.shape == shape] for shape in {job.shape for job in jobs}}
    return [group[i:i + width] for _, group in sorted(by_shape.items()) for i in range(0, len(group), width)]


@pytest.mark.parametrize("steps_at_once", [None, 2])
def test_the_division_does_not_change_what_is_trained(monkeypatch, steps_at_once):
    fed = federation([0, 8, 16, 0, 8, 16, 24])
    results = []
    for division in (chunks, as_named):
        monkeypatch.setattr(executor, "chunks", division)
        trained, = Executor(3, steps_at_once).train([Work(fed, dict.fromkeys(range(7), toy.toy_adapters(fed.strategy)),
                                                          1, "plain", "plain")])
        results.append([trained.adapters[client] for client in range(7)])
    assert tree_max_difference(*results) <= 1e-6


@pytest.mark.long
def test_a_joined_client_of_the_embedded_base():
    """Three clients of three lengths in one chunk train as each does alone, in the same shape or its own."""
    setup = prepare.prepare(small_config(train={"optimizer": "sgd", "lr_connector": 0.02, "lr_lora_stage1": 0.02}))
    clients = tuple(map(longer, setup.federation.clients[:3], (0, 8, 16), (0, 4, 4)))
    fed = dataclasses.replace(setup.federation, clients=clients)
    adapters = dict.fromkeys(range(3), prepare.initial_adapters(fed))
    results = [Executor(width).train([Work(fed, adapters, 1, "stage1", "stage1")])[0].adapters for width in (3, 1)]
    moved = [jax.tree.map(np.subtract, result, adapters) for result in results]
    assert tree_max_difference(*moved) <= 1e-6 < tree_max_difference(moved[0], jax.tree.map(np.zeros_like, moved[0]))
