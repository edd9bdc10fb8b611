"""Tests of the bounds on what one client can do to the others, against NumPy float64 written from the formulas."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from conftest import ROOT, small_config, tree_max_difference

from pilot_jax.config import FederationConfig, load_config
from pilot_jax.data.llava.sample import Sample
from pilot_jax.errors import InputError, Interrupted
from pilot_jax.federation import defence, mixing
from pilot_jax.federation.cohort import Cohort
from pilot_jax.federation.defence import Defence
from pilot_jax.federation.distances import distances
from pilot_jax.federation.halves import SKETCH
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.rounds import run_round
from pilot_jax.federation.strategies import STRATEGIES, make_strategy
from pilot_jax.runs import simulate
from pilot_jax.testing.attacks import AttackedExecutor, Phase, scaled, sybils, vector, with_flipped_answers
from pilot_jax.testing.toy import run_toy, toy_adapters, toy_clients, toy_federation, toy_state

SIX = ("t0", "t0", "t1", "t1", "t2", "t2")


def loras(cohort=6, seed=0, spread=1.0):
    """Returns LoRA with leaves [S, …] that differ by `spread`."""
    rng = np.random.default_rng(seed)
    return {"layers": {name: {
        "a": (rng.normal(size=(2, 3, 7)) + spread * rng.normal(size=(cohort, 2, 3, 7))).astype(np.float32),
        "b": (rng.normal(size=(2, 5, 3)) + spread * rng.normal(size=(cohort, 2, 5, 3))).astype(np.float32)}
        for name in ("q", "down")}}


def rows(tree, cohort):
    return np.concatenate([np.asarray(x, np.float64).reshape(cohort, -1) for x in jax.tree.leaves(tree)], axis=1)


def clipped64(v, limit):
    norm = np.linalg.norm(v)
    return v if norm <= limit else v * (limit / norm)


def lower_median(values):
    return sorted(values)[(len(values) - 1) // 2]


def test_clipped_gossip():
    """Mixtures are x_k + Σ_j w_kj·clip(x_j − x_k, C), C the factor times the lower median of the changes' norms."""
    cohort = 6
    now, before = loras(seed=1), loras(seed=2, spread=0.1)
    x, moved = rows(now, cohort), rows(now, cohort) - rows(before, cohort)
    weights = np.random.default_rng(3).dirichlet(np.ones(cohort), cohort).astype(np.float32)
    uploads, starts = {"text_adapter": now}, {"text_adapter": before}
    given = Cohort(uploads, np.ones(cohort, int), np.zeros(cohort, int), np.arange(cohort), 1, starts)
    for factor, updates in itertools.product((0.1, 0.7, 3.0), (False, True)):
        limit = factor * lower_median(np.linalg.norm(moved, axis=1))
        mixed = moved if updates else x
        want = [mixed[k] + sum(weights[k, j] * clipped64(mixed[j] - mixed[k], limit) for j in range(cohort) if j != k)
                for k in range(cohort)]
        got, kept, seen = Defence(clip=factor).applied(weights, given, {}, updates)
        np.testing.assert_allclose(got @ mixed, want, atol=2e-5)
        np.testing.assert_allclose(got.sum(axis=1), 1, atol=1e-6)
        assert not kept and not seen
        assert np.all(np.linalg.norm(got @ mixed - mixed, axis=1) <= (1 - np.diag(weights)) * limit * (1 + 1e-5))
    assert np.array_equal(Defence(clip=1e6).applied(weights, given, {}, False)[0], weights)


def test_changes_are_clipped_at_their_median_norm():
    """Each subtree by itself: start + change·min(1, C/‖change‖); what is not above C stays as it is, bit for bit."""
    rng = np.random.default_rng(0)
    lengths = np.asarray([1.0, 5.0, 2.0, 0.0, 900.0])
    start = {"one": {"w": rng.normal(size=(5, 4, 3)).astype(np.float32)}, "two": rng.normal(size=(5, 6)).astype(
        np.float32)}
    change = {n: jax.tree.map(lambda s: rng.normal(size=s.shape), t) for n, t in start.items()}
    scale = lengths / np.linalg.norm(rows(change["one"], 5), axis=1)
    change["one"]["w"] = change["one"]["w"] * scale[:, None, None]
    upload = jax.tree.map(lambda s, c: (s + c).astype(np.float32), start, change)
    got = defence.clip_changes(upload, start, 1.5)
    for name in start:
        moved = rows(upload[name], 5) - rows(start[name], 5)
        limit = 1.5 * lower_median(np.linalg.norm(moved, axis=1))
        want = rows(start[name], 5) + [clipped64(m, limit) for m in moved]
        np.testing.assert_allclose(rows(got[name], 5), want, atol=1e-5)
        short = np.linalg.norm(moved, axis=1) <= limit * (1 - 1e-6)
        assert short.sum() == (3 if name == "one" else 5)
        assert np.array_equal(rows(got[name], 5)[short], rows(upload[name], 5)[short])


def test_a_lower_median_of_two():
    """One of two clients cannot raise the bound for itself."""
    assert defence.radius(np.asarray([1.0, 100.0]), 2.0) == 2.0
    assert defence.radius(np.asarray([3.0]), 1.0) == 3.0
    assert defence.clip_scales(np.asarray([0.0, 4.0]), 0.0).tolist() == [1.0, 0.0]


def capped64(weights, one, together):
    out = np.zeros_like(weights)
    for k, row in enumerate(weights):
        others = [min(w, one) if j != k else 0.0 for j, w in enumerate(row)]
        total = sum(others)
        out[k] = [w * min(1, together / total) if total > 0 else w for w in others]
        out[k, k] = 1 - sum(out[k])
    return out


@pytest.mark.parametrize(("one", "together"), [(0.1, 0.25), (0.3, 1.0), (1.0, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_caps(one, together):
    weights = np.random.default_rng(0).dirichlet(0.3 * np.ones(7), 7)
    got = defence.capped(weights, one, together)
    np.testing.assert_allclose(got, capped64(weights, one, together), atol=1e-6)
    others = got - np.diag(np.diag(got))
    assert others.max() <= one + 1e-6 and others.sum(axis=1).max() <= together + 1e-6
    assert np.array_equal(defence.capped(weights, None, None), weights.astype(np.float32))


def foolsgold64(histories):
    """Algorithm 1 of FoolsGold, one client at a time."""
    n = len(histories)

    def cosine(a, b):
        return a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-30)

    most = [max([0.0, *(cosine(histories[i], histories[j]) for j in range(n) if j != i)]) for i in range(n)]
    alpha = []
    for i in range(n):
        row = [0.0]
        for j in range(n):
            if j != i:
                pardon = most[i] / most[j] if most[j] > most[i] else 1.0
                row.append(cosine(histories[i], histories[j]) * pardon)
        alpha.append(min(1.0, max(0.0, 1 - max(row))))
    out, largest = [], max(alpha)
    for a in alpha:
        share = min(a / largest, 0.99)
        out.append(0.0 if share <= 0 else min(1.0, max(0.0, np.log(share / (1 - share)) + 0.5)))
    return np.asarray(out)


def test_foolsgold():
    """Sybils that repeat each other have no credit, honest clients in directions of their own have all of it."""
    rng = np.random.default_rng(1)
    common = rng.normal(size=40)
    histories = rng.normal(size=(7, 40)) + 0.4 * common
    histories[5:] = common + 0.05 * rng.normal(size=(2, 40))
    got = defence.credit(histories.astype(np.float32))
    np.testing.assert_allclose(got, foolsgold64(histories), atol=1e-4)
    assert got[5:].max() == 0 and got[:5].max() == 1 and np.any((got > 0) & (got < 1))
    assert np.array_equal(defence.credit(np.ones((3, 4), np.float32)), np.zeros(3))
    assert np.array_equal(defence.credit(np.asarray([[1.0, 2.0]], np.float32)), np.ones(1))
    np.testing.assert_allclose(defence.credit(np.eye(3, dtype=np.float32)), np.ones(3))


def test_histories_are_sums_of_changes_and_scale_weights():
    """Histories go on over phases with other cohorts; weights of others are multiplied by their credit."""
    parts = [(loras(4, seed=s), np.asarray(ids)) for s, ids in ((1, [0, 1, 2, 5]), (2, [1, 2, 4, 5]))]
    sums, server = {}, {}
    zero = jax.tree.map(np.zeros_like, loras(4))
    weights = np.random.default_rng(3).dirichlet(np.ones(4), 4).astype(np.float32)
    for number, (lora, ids) in enumerate(parts):
        for c, moved in zip(ids, rows(lora, 4), strict=True):
            sums[int(c)] = sums.get(int(c), 0) + moved
        given = Cohort({"text_adapter": lora}, np.ones(4, int), np.zeros(4, int), ids, number + 1,
                       {"text_adapter": zero})
        got, kept, seen = Defence(foolsgold=True).applied(weights, given, server, False)
        server = {**server, **kept}
        alpha = foolsgold64(np.stack([sums[int(c)] for c in ids]))
        np.testing.assert_allclose(seen["credit"], alpha, atol=1e-4)
        want = weights * alpha
        np.fill_diagonal(want, 0)
        want += np.diag(1 - want.sum(axis=1))
        np.testing.assert_allclose(got, want, atol=1e-4)
    assert sorted(server["histories"]) == [0, 1, 2, 4, 5]
    np.testing.assert_allclose(np.linalg.norm(server["histories"][1]), np.linalg.norm(sums[1]), rtol=1e-5)


def test_split_half_bounds_each_mixture_by_its_own_median():
    """start + change + Σ_j w_kj·clip(change_j − change, C), LoRA and the projector each with its own weights and C;
    then the caps."""
    rng, sizes = np.random.default_rng(0), np.asarray([4, 8, 6, 5, 7])
    uploads = {"text_adapter": loras(5, seed=1), "projector": {"w": rng.normal(size=(5, 4, 3)).astype(np.float32)}}
    starts = {"text_adapter": loras(5, seed=2, spread=0.1), "projector": {"w": np.zeros((5, 4, 3), np.float32)}}
    ratios = {name: rng.uniform(-0.2, 0.6, (5, 5)) * scale for name, scale in (("text_adapter", 1), ("projector", 0.2))}
    given = Cohort(uploads, sizes, np.zeros(5, int), np.arange(5), 1, starts, None, ratios)
    for params in ({"clip": 0.4}, {"cap_one": 0.08, "cap_all": 0.2}, {"clip": 0.4, "cap_one": 0.08, "cap_all": 0.2}):
        out = make_strategy("split_half", params).aggregate(given, {})
        for name, limit in (("text_adapter", 0.5), ("projector", 0.1)):
            raw = sizes * np.where(np.eye(5, dtype=bool), 1, np.clip(1 - ratios[name] / limit, 0, 1))
            weights, moved = raw / raw.sum(axis=1, keepdims=True), rows(uploads[name], 5) - rows(starts[name], 5)
            if "clip" in params:
                longest = 0.4 * lower_median(np.linalg.norm(moved, axis=1))
                apart = np.linalg.norm(moved[:, None] - moved[None], axis=2)
                weights = weights * np.minimum(1, longest / np.maximum(apart, 1e-9))
                weights += np.diag(1 - weights.sum(axis=1))
            weights = capped64(weights, params.get("cap_one", 1), params.get("cap_all", 1))
            got = out.mixing["weights" if name == "text_adapter" else "weights_projector"]
            np.testing.assert_allclose(got, weights, atol=1e-5)
            np.testing.assert_allclose(rows(out.downloads[name], 5), rows(starts[name], 5) + weights @ moved, atol=1e-4)


def test_rules_follow_each_other():
    """Credit first, then clipping, then the caps."""
    now, before = loras(5, seed=1), loras(5, seed=2, spread=0.1)
    weights = np.random.default_rng(0).dirichlet(np.ones(5), 5).astype(np.float32)
    given = Cohort({"text_adapter": now}, np.ones(5, int), np.zeros(5, int), np.arange(5), 1, {"text_adapter": before})
    moved = rows(now, 5) - rows(before, 5)
    limit = 0.6 * lower_median(np.linalg.norm(moved, axis=1))
    apart = np.linalg.norm(rows(now, 5)[:, None] - rows(now, 5)[None], axis=2)
    want = weights * foolsgold64(moved) * np.minimum(1, limit / np.maximum(apart, 1e-9))
    got = Defence(0.6, True, 0.05, 0.1).applied(weights, given, {}, False)[0]
    np.testing.assert_allclose(got, capped64(want, 0.05, 0.1), atol=1e-4)


class Mixtures(RunObserver):
    """Collects the arrays of each phase's aggregation."""

    def __init__(self):
        self.arrays = []

    def phase_ended(self, state, record, mixing, trained):
        self.arrays.append(mixing)


class StopsAfterOneRound(RunObserver):
    """Asks for the end of a run as soon as its first round has had its last phase."""

    over = False

    def phase_ended(self, state, record, mixing, trained):
        self.over = self.over or record["phase"] == "stage2"

    def stop_requested(self):
        return 15 if self.over else 0


def toy(name, **params):
    """Returns a federation of six toy clients, of three tasks."""
    return toy_federation(make_strategy(name, params), toy_clients((4, 8, 6, 5, 7, 6), SIX))


def attacked(fed, attack, attackers=(5,)):
    """Returns the last state of a federation under attack."""
    state, executor = toy_state(fed), AttackedExecutor(2, None, attackers, attack)
    while state.round <= fed.settings.rounds:
        state, = run_round([fed], [state], executor)
    return state


def test_norm_clipping_bounds_what_one_client_does_to_a_common_model():
    """FedAvg's model moves by no more than the median change, whatever an attacker sends; without it, by far more."""
    moves = {}
    for clip in (None, 1.0):
        fed = toy("fedavg", clip=clip)
        fed = dataclasses.replace(fed, settings=FederationConfig(rounds=1, local_epochs=3))
        honest = run_toy(fed)
        state = attacked(fed, scaled(50))
        moves[clip] = tree_max_difference(state.server["model"], honest.server["model"])
    assert moves[1.0] < 0.3 and moves[None] > 5 * moves[1.0]


def test_one_model_is_the_mean_of_clipped_changes():
    fed = toy("fedavg", clip=0.5)
    start = jax.tree.map(np.asarray, toy_adapters(fed.strategy))
    rng = np.random.default_rng(0)
    uploads = {n: jax.tree.map(lambda x: np.stack([x + (k + 1) * rng.normal(size=x.shape) for k in range(6)]).astype(
        np.float32), start[n]) for n in ("text_adapter", "projector")}
    starts = {n: jax.tree.map(lambda x: np.broadcast_to(x, (6, *x.shape)), start[n]) for n in uploads}
    sizes = np.asarray([4, 8, 6, 5, 7, 6])
    out = fed.strategy.aggregate(Cohort(uploads, sizes, np.zeros(6, int), np.arange(6), 1, starts),
                                 {"model": {n: start[n] for n in uploads}})
    for name in uploads:
        moved = rows(uploads[name], 6) - rows(starts[name], 6)
        limit = 0.5 * lower_median(np.linalg.norm(moved, axis=1))
        want = rows(starts[name], 6)[0] + sizes @ [clipped64(m, limit) for m in moved] / sizes.sum()
        np.testing.assert_allclose(vector(out.server["model"][name]), want, atol=1e-5)
    assert mixing.check_rows(out.mixing["weights"]) is None


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_takes_a_clip_or_refuses_it(name):
    """A huge clip changes nothing: adapters are bit for bit those without it."""
    try:
        make_strategy(name, {"clip": 1e9})
    except InputError as error:
        assert "strategy.clip" in str(error) and name in str(error)
        assert name not in ("fedavg", "fedprox", "fedadam", "median", "ffa_lora", "pilot", "split_half")
        return
    if name.startswith("pilot"):
        return  # the toy has no visual adapters; below
    plain, bounded = run_toy(toy(name)), run_toy(toy(name, clip=1e9))
    assert tree_max_difference(plain.server, bounded.server) == 0
    assert tree_max_difference(plain.population[0].adapters, bounded.population[0].adapters) == 0


def test_sybils_are_where_they_say():
    """Copies of the victim with poison of the given norm, orthogonal to what the victim has learnt."""
    before, after = loras(4, seed=1, spread=0.0), loras(4, seed=2)
    one = [{c: {"text_adapter": jax.tree.map(lambda x, c=c: x[c], tree)} for c in range(4)} for tree in (after, before)]
    for size, differ in ((0.5, False), (None, False), (None, True)):
        phase = Phase(one[0], one[1], (2, 3), False)
        out = sybils(0, size, differ)(phase)
        victim, learnt = vector(one[0][0]["text_adapter"]), phase.change(0)
        poisons = [vector(out[a]["text_adapter"]) - victim for a in (2, 3)]
        norm = 0.99 * min(np.linalg.norm(phase.change(c)) for c in (0, 1)) if size is None else (
            size * np.linalg.norm(learnt))
        for poison in poisons:
            np.testing.assert_allclose(np.linalg.norm(poison), norm, rtol=1e-5)
            assert abs(poison @ learnt) < 1e-4 * norm * np.linalg.norm(learnt)
        cosine = poisons[0] @ poisons[1] / norm**2
        assert abs(cosine - (0 if differ else 1)) < 1e-4
    measured = [{c: {**parts, "projector": jax.tree.map(lambda x: x[:1], parts["text_adapter"]),
                     SKETCH: {"text_adapter": np.full(3, c), "projector": np.full(2, c)}} for c, parts in side.items()}
                for side in one]
    out = sybils(0, 0.5)(Phase(measured[0], measured[1], (2, 3), True))
    for name in ("text_adapter", "projector"):
        phase = Phase(measured[0], measured[1], (2, 3), True)
        poison = vector(out[2][name]) - vector(measured[1][2][name]) - phase.change(0, name)
        np.testing.assert_allclose(np.linalg.norm(poison), 0.5 * np.linalg.norm(phase.change(0, name)), rtol=1e-4)
        assert out[3][SKETCH][name][0] == 0
    flipped = scaled(-1)(Phase(one[0], one[1], (2,), False))
    np.testing.assert_allclose(vector(flipped[2]["text_adapter"]), 2 * vector(one[1][2]["text_adapter"]) - vector(
        one[0][2]["text_adapter"]), atol=1e-5)


def test_flipped_answers():
    """Every training answer of the named clients goes to another of the client's samples; nothing else changes."""
    samples = [Sample(str(i), None, (("human", f"q{i}"), ("gpt", f"a{i}")), "t", f"c{i % 2}",
                      "test" if i > 7 else "train", "") for i in range(12)]
    flipped = with_flipped_answers(samples, ["c1"], seed=3)
    changed = [i for i, (old, new) in enumerate(zip(samples, flipped, strict=True)) if old != new]
    assert changed == [1, 3, 5, 7]
    assert sorted(flipped[i].turns[1][1] for i in changed) == [f"a{i}" for i in changed]
    assert all(new.turns[0] == old.turns[0] for old, new in zip(samples, flipped, strict=True))


def test_a_wrong_bound_is_refused():
    for change in ("strategy.clip=0", "strategy.ata.cap_one=1.5", "strategy.ata.cap_all=-1"):
        with pytest.raises(InputError, match=change.split("=", maxsplit=1)[0].replace(".", r"\.")):
            load_config(ROOT / "configs" / "quickstart.yaml", [change])


def pilot_config(**ata):
    return small_config(strategy={"name": "pilot", "clip": 1.0, "ata": ata}, federation={"rounds": 2})


@pytest.mark.long
def test_pilot_under_its_bounds():
    """Weights in real rounds stay within the caps; nobody is refused; ψ_t moves no farther than its median change."""
    seen = Mixtures()
    run = simulate.simulate(pilot_config(weighting="share_of_sizes", cap_one=0.1, cap_all=0.15, foolsgold=True),
                            observers=[seen])
    assert len(seen.arrays) == 3
    for arrays in seen.arrays:
        others = arrays["weights"] - np.diag(np.diag(arrays["weights"]))
        assert others.max() <= 0.1 + 1e-6 and others.sum(axis=1).max() <= 0.15 + 1e-6
        assert arrays["credit"].shape == (9,)
    assert run.summary["quarantined"] == 0


@pytest.mark.long
@pytest.mark.parametrize("data", [
    {"digits": {"scenario": "b", "train": 8, "validation": 1, "test": 1}},
    {"digits": {"scenario": "c", "train": 8, "validation": 1, "test": 1}},
    {"path": "emoji", "emoji": {"train": 8, "validation": 1, "test": 1}}], ids=["b", "c", "emoji"])
def test_nobody_honest_is_refused(data):
    """Without attackers, all uploads of all clients are accepted, with bounds too; scenario a is above."""
    run = simulate.simulate(small_config(
        strategy={"name": "pilot", "clip": 1.0, "ata": {"cap_one": 0.2}}, federation={"rounds": 2}, data=data))
    assert run.summary["quarantined"] == 0 and all(c.rounds == 2 for c in run.population)


@pytest.mark.long
def test_histories_survive_a_resumed_run(tmp_path):
    """A run that was stopped after its first round ends with the adapters of one that was not."""
    config = pilot_config(foolsgold=True, cap_one=0.3)

    with pytest.raises(Interrupted):
        simulate.simulate(config, out=tmp_path / "run", observers=[StopsAfterOneRound()])
    resumed = simulate.simulate(config, out=tmp_path / "run", resume=True)
    whole = simulate.simulate(config)
    assert resumed.summary["adapters_sha256"] == whole.summary["adapters_sha256"]


def test_distances_of_what_is_mixed_are_exact():
    """The distances that clip are those of float64."""
    tree = loras(20, seed=4, spread=1e-3)
    x = rows(tree, 20)
    np.testing.assert_allclose(distances(tree), np.linalg.norm(x[:, None] - x[None], axis=2), rtol=1e-4, atol=1e-6)
