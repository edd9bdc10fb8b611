"""Tests of how weighted LoRAs become one, against float64, and of LoRA ranks that differ by client."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from conftest import slow_except, small_config, tree_max_difference
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from scipy.linalg import orthogonal_procrustes
from transformers import AutoModelForImageTextToText

import pilot_jax
from pilot_jax.config import apply_overrides, parse_config
from pilot_jax.errors import InputError
from pilot_jax.evaluation.personalised import used_adapters
from pilot_jax.federation import combining, mixing
from pilot_jax.federation.distances import distances
from pilot_jax.federation.lora_options import common, fitted, rank_of, with_rank
from pilot_jax.federation.strategies import STRATEGIES, make_strategy
from pilot_jax.models.checkpoints.peft import peft_lora, smallest
from pilot_jax.models.lora import assembled
from pilot_jax.models.pretrained import model_directory
from pilot_jax.models.vlm import variables
from pilot_jax.runs import prepare
from pilot_jax.runs.export import export_client, merge_client
from pilot_jax.testing.phases import train_phase
from pilot_jax.testing.toy import RANK, run_toy, toy_clients, toy_federation, toy_state

COHORT, LAYERS, R = 4, 2, 2
SHAPES = {"q": (9, 7)}  # d_in, d_out
WEIGHTS = np.asarray([[0.1, 0.2, 0.3, 0.4], [0.0, 0.7, 0.0, 0.3]])


def loras(seed=0, cohort=COHORT, rank=R):
    rng = np.random.default_rng(seed)
    return {"layers": {name: {"a": rng.normal(size=(cohort, LAYERS, rank, d_in)).astype(np.float32),
                              "b": rng.normal(size=(cohort, LAYERS, d_out, rank)).astype(np.float32)}
                       for name, (d_in, d_out) in SHAPES.items()}}


def products(lora):
    """Returns B·A of every target, [..., layers, d_out, d_in], float64."""
    return {name: np.float64(pair["b"]) @ np.float64(pair["a"]) for name, pair in lora["layers"].items()}


def mixed_products(lora, weights=WEIGHTS):
    return {name: np.einsum("ms,s...->m...", weights, whole) for name, whole in products(lora).items()}


def test_product_is_the_best_approximation():
    """Rows of weights and layers each agree with the truncated SVD of the full matrix in float64."""
    given = loras()
    got = products(combining.product(WEIGHTS, given))
    for name, whole in mixed_products(given).items():
        u, s, vt = np.linalg.svd(whole)
        best = np.einsum("mlor,mlr,mlri->mloi", u[..., :R], s[..., :R], vt[..., :R, :])
        np.testing.assert_allclose(got[name], best, atol=2e-5)
        assert np.abs(best - whole).max() > 0.1


def test_product_of_full_rank_is_the_mean_of_the_products():
    given = loras(rank=7)  # min(d_in, d_out) is 7
    got = products(combining.product(WEIGHTS, given))
    for name, whole in mixed_products(given).items():
        np.testing.assert_allclose(got[name], whole, atol=1e-5 * np.abs(whole).max())


def test_product_begins_with_its_best_ranks_and_keeps_every_direction_of_a():
    given = loras(rank=4)
    mixed = combining.product(WEIGHTS, given)
    for name, whole in mixed_products(given).items():
        a, b = (np.float64(mixed["layers"][name][x]) for x in "ab")
        u, s, vt = np.linalg.svd(whole)
        best = u[..., :1] * s[..., None, :1] @ vt[..., :1, :]
        np.testing.assert_allclose(b[..., :1] @ a[..., :1, :], best, atol=2e-5)
        np.testing.assert_allclose(a @ a.swapaxes(-1, -2), np.broadcast_to(np.eye(4), (*a.shape[:2], 4, 4)), atol=1e-5)
    nothing = jax.tree.map(np.zeros_like, given)
    nothing["layers"]["q"]["a"] = given["layers"]["q"]["a"]
    start = combining.product(WEIGHTS, nothing)["layers"]["q"]
    assert np.linalg.norm(start["a"], axis=-1).min() > 0.99  # B = 0 can be trained only where A is not 0
    assert np.abs(start["b"]).max() == 0


@pytest.mark.slow
def test_product_of_the_largest_weights_alone():
    given = loras()
    rows = WEIGHTS[1:]
    assert tree_max_difference(combining.product(rows, given, terms=2), combining.product(rows, given)) < 2e-5


@pytest.mark.parametrize("factor", slow_except("a", "ab"))
def test_aligned_is_the_mean_after_procrustes(factor):
    given, reference = loras(), jax.tree.map(lambda leaf: leaf[:2], loras(1))
    got = combining.aligned(WEIGHTS, given, reference, factor=factor)
    for name, pair in given["layers"].items():
        want = {x: np.zeros_like(np.float64(got["layers"][name][x])) for x in "ab"}
        for m, layer, s in np.ndindex(len(WEIGHTS), LAYERS, COHORT):
            a, b = np.float64(pair["a"][s, layer]), np.float64(pair["b"][s, layer])
            goal = np.float64(reference["layers"][name][factor][m, layer])
            q, _ = orthogonal_procrustes(*((a.T, goal.T) if factor == "a" else (b, goal)))
            np.testing.assert_allclose((b @ q) @ (q.T @ a), b @ a, atol=1e-12)
            want["a"][m, layer] += WEIGHTS[m, s] * q.T @ a
            want["b"][m, layer] += WEIGHTS[m, s] * b @ q
        for x in "ab":
            np.testing.assert_allclose(got["layers"][name][x], want[x], atol=2e-5)


@pytest.mark.parametrize("factor", slow_except("b", "ab"))
def test_alignment_changes_no_clients_product(factor):
    """With all weight on one client, the result is that client's B·A, however it was rotated."""
    given, reference = loras(), loras(1)
    got = products(combining.aligned(np.eye(COHORT), given, reference, factor=factor, strength=0.6))
    for name, whole in products(given).items():
        np.testing.assert_allclose(got[name], whole, atol=1e-5)


def test_rotated_copies_of_one_client_are_brought_together():
    """The mean of factors of rotated copies is not their product; after alignment it is."""
    rng, one = np.random.default_rng(0), loras(cohort=1)["layers"]["q"]
    turns = np.stack([np.linalg.qr(rng.normal(size=(R, R)))[0] for _ in range(COHORT)])
    turns[0] = np.eye(R)
    copies = {"layers": {"q": {"a": np.einsum("srt,lri->slti", turns, one["a"][0]).astype(np.float32),
                               "b": np.einsum("ldr,srt->sldt", one["b"][0], turns).astype(np.float32)}}}
    rows, first = np.full((1, COHORT), 1 / COHORT), jax.tree.map(lambda leaf: leaf[:1], copies)
    whole, = products({"layers": {"q": one}}).values()
    plain = products(jax.tree.map(np.asarray, mixing.apply(rows, copies)))["q"]
    assert np.abs(plain - whole).max() > 0.1
    np.testing.assert_allclose(products(combining.aligned(rows, copies, first))["q"], whole, atol=1e-5)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_rotation_of_a_part(strength):
    """Below 1 the matrix is a rotation proper, between the identity and the whole rotation (float64 from the paper)."""
    rng = np.random.default_rng(3)
    own, goal = rng.normal(size=(2, 4, 8))
    own[0] *= -1  # the best orthogonal matrix may then be a reflection
    u, _, vt = np.linalg.svd(own @ goal.T)
    q = u @ vt
    if strength < 1:
        if np.linalg.det(q) < 0:
            vt[-1] *= -1
        u, _, vt = np.linalg.svd((1 - strength) * np.eye(4) + strength * u @ vt)
        q = u @ vt
        assert np.linalg.det(q) == pytest.approx(1)
    np.testing.assert_allclose(combining.rotation(jnp.float32(own), jnp.float32(goal), strength), q, atol=1e-5)


def test_residual_leaves_nothing():
    """B̄Ā and the residual add up to the mean of the products, also after a second time."""
    given, again = loras(), loras(2)
    weights = WEIGHTS[0]
    empty = {"layers": {name: {"a": np.zeros((LAYERS, min(pair), pair[0]), np.float32),
                               "b": np.zeros((LAYERS, pair[1], min(pair)), np.float32)}
                        for name, pair in SHAPES.items()}}
    total, change = dict.fromkeys(SHAPES, 0.0), empty
    for lora in (given, again):
        mean = jax.tree.map(lambda leaf: np.asarray(leaf[0]), mixing.apply(WEIGHTS[:1], lora))
        change, lost = combining.residual(weights, lora, change, mean)
        for name, whole in mixed_products(lora, WEIGHTS[:1]).items():
            total[name] = total[name] + whole[0] - products(mean)[name]
            np.testing.assert_allclose(products(change)[name], total[name], atol=2e-5)
        assert float(lost) < 1e-10


@pytest.mark.slow
def test_residual_of_a_limited_rank_says_what_it_loses():
    given, weights = loras(), WEIGHTS[0]
    limited = {"layers": {name: {"a": np.zeros((LAYERS, 1, d_in), np.float32),
                                 "b": np.zeros((LAYERS, d_out, 1), np.float32)}
                          for name, (d_in, d_out) in SHAPES.items()}}
    mean = jax.tree.map(lambda leaf: np.zeros_like(leaf[0]), given)
    change, lost = combining.residual(weights, given, limited, mean)
    whole = {name: value[0] for name, value in mixed_products(given, WEIGHTS[:1]).items()}
    error = sum(np.sum((products(change)[name] - value) ** 2) for name, value in whole.items())
    assert float(lost) == pytest.approx(error / sum(np.sum(value**2) for value in whole.values()), rel=1e-4)
    assert 0.1 < float(lost) < 0.9


# Which strategies take which ways


def test_every_strategy_takes_the_ways_that_fit_it():
    ways = {name: make_strategy(name).combines() for name, kind in STRATEGIES.items()
            if kind.__module__.startswith("pilot_jax.")}
    every = ("factors", "product", "aligned", "exact")
    for name in ("fedavg", "fedprox", "feddpa", "flexlora", "flora"):
        assert ways[name] == every, name
    for name in ("pilot", "similarity"):
        assert ways[name] == every[:3], name
    for name in ("fedavgm", "fedadam"):
        assert ways[name] == ("factors", "aligned"), name
    for name in ("local", "centralised", "ffa_lora", "fedsa_lora", "scaffold", "median", "trimmed_mean"):
        assert ways[name] == ("factors",), name
    with pytest.raises(InputError, match=r"strategy\.combine: exact does not fit pilot. It takes factors, product, al"):
        make_strategy("pilot", {"combine": "exact"})


@pytest.mark.parametrize("combine", ["product", "aligned", "exact"])
def test_fedavg_with_a_way_is_the_strategy_of_that_name(combine):
    name = {"product": "flexlora", "aligned": "fedrot_lora", "exact": "fedex_lora"}[combine]
    ours = run_toy(toy_federation(make_strategy("fedavg", {"combine": combine})))
    named = run_toy(toy_federation(make_strategy(name)))
    for one, other in zip(ours.population, named.population, strict=True):
        assert tree_max_difference(one.adapters, other.adapters) == 0


def test_another_name_brings_its_own_way():
    """A config that was written with all keys, as that of a run, gets another strategy by its name alone."""
    whole = parse_config(yaml.safe_load(parse_config({}).to_yaml()))
    for name, way in (("flexlora", "product"), ("fedex_lora", "exact"), ("fedavg", "factors")):
        named = apply_overrides(whole, [f"strategy.name={name}"])
        assert (named.strategy.name, named.strategy.combine) == (name, way)
        assert apply_overrides(named, ["strategy.name=pilot"]).strategy == whole.strategy
    kept = apply_overrides(whole, ["strategy.ata.neighbors=5", "strategy.combine=aligned", "strategy.name=similarity"])
    assert kept.strategy.combine == "aligned"
    with pytest.raises(InputError, match=r"strategy\.combine.*product"):
        apply_overrides(whole, ["strategy.name=flexlora", "strategy.combine=factors"])


def test_identical_clients_are_combined_into_themselves():
    """Whatever the way, the mean of equal models is that model: same B·A, and no change of the frozen weights."""
    clients = [dataclasses.replace(toy_clients()[1], name=f"c{k}") for k in range(3)]
    expected = None
    for name in ("fedavg", "flexlora", "fedrot_lora", "fedex_lora"):
        fed = toy_federation(make_strategy(name), clients)
        end = run_toy(fed).population[0].adapters
        whole = products(assembled({"text_adapter": end["text_adapter"]}))["q"] + end["projector"]["w"]
        if "text_residual" in end:
            assert np.abs(products(end["text_residual"])["q"]).max() < 1e-6
        if name != "flexlora":  # its factors have another scale, so that they train differently
            expected = whole if expected is None else expected
            np.testing.assert_allclose(whole, expected, atol=2e-6)


# Ranks that differ


RANKS = (1, 2, 1)


def test_a_client_of_a_lower_rank_trains_as_if_it_were_alone():
    """Local training of clients of ranks 1, 2, 1 side by side is that of a federation with each one's own rank."""
    together = run_toy(toy_federation(make_strategy("local"), ranks=RANKS)).population
    for k, rank in enumerate(RANKS):
        fed = toy_federation(make_strategy("local"))
        start = jax.tree.map(np.asarray, toy_state(fed).population[k].adapters)
        pair = start["text_adapter"]["layers"]["q"]
        # The toy's model has no α/r: with W + B·A, a client of half the rank has the factor 2, and half of B at first.
        start["text_adapter"] = {"layers": {"q": {"a": pair["a"][:, :rank], "b": pair["b"][..., :rank] * rank / RANK}}}
        fed = dataclasses.replace(fed, model=_scaled(fed.model, RANK / rank), rank=rank)
        alone = run_toy(fed, toy_state(fed, start)).population[k].adapters
        both = together[k].adapters
        assert rank_of(both) == (rank, RANK)
        for x, part in (("a", np.s_[:, :rank]), ("b", np.s_[..., :rank])):
            got, want = (adapters["text_adapter"]["layers"]["q"][x] for adapters in (both, alone))
            np.testing.assert_allclose(got[part], want, atol=1e-6)
            rest = np.delete(got, np.s_[:rank], axis=1 if x == "a" else 2)
            assert not rest.any()
        np.testing.assert_allclose(both["projector"]["w"], alone["projector"]["w"], atol=1e-6)


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """The toy's model with a factor at B·A."""

    module: object
    factor: float

    def apply(self, variables, batch, stage, task_index, *, method):
        pair = variables["lora"]["decoder"]["layers"]["q"]
        lora = {"decoder": {"layers": {"q": {"a": pair["a"], "b": pair["b"] * self.factor}}}}
        return self.module.apply(variables | {"lora": lora}, batch, stage, task_index, method=method)


def _scaled(model, factor):
    return type(model)(module=_Scaled(model.module, factor), base=model.base)


def test_the_server_works_in_one_scale():
    """What a client uploads and receives again, unmixed, is its own; the server's B is R/r times the client's."""
    one = {"text_adapter": jax.tree.map(lambda leaf: leaf[0], loras(rank=4)), "projector": {"w": np.ones(3)}}
    client = with_rank(one, 1, 4)
    up = common({n: client[n] for n in one}, client)
    ours, sent = (tree["text_adapter"]["layers"]["q"] for tree in (client, up))
    np.testing.assert_array_equal(sent["b"], 4 * ours["b"])
    np.testing.assert_array_equal(sent["b"][..., :1], one["text_adapter"]["layers"]["q"]["b"][..., :1])
    assert tree_max_difference(fitted(up, client), {n: client[n] for n in one}) == 0
    assert up["projector"] is one["projector"]


@pytest.mark.parametrize("name", ["fedavg", "flexlora"])
def test_a_round_with_ranks_that_differ(name):
    """The server's model is the mean in the common scale, or its best approximation, cut to each client's rank."""
    fed = toy_federation(make_strategy(name), ranks=RANKS)
    state = toy_state(fed)
    trained, _ = train_phase(fed, {k: c.adapters for k, c in enumerate(state.population)}, 1, "plain", "plain")
    end = run_toy(dataclasses.replace(fed, settings=fed.settings.model_copy(
        update={"rounds": 1}), strategy=dataclasses.replace(fed.strategy, schedule="single"))).population
    sizes = [c.size for c in fed.clients]
    pairs = [trained[k]["text_adapter"]["layers"]["q"] for k in range(3)]
    a = [np.float64(p["a"][0]) for p in pairs]
    b = [np.float64(p["b"][0]) * RANK / rank for p, rank in zip(pairs, RANKS, strict=True)]
    w = np.asarray(sizes) / sum(sizes)
    mean_a, mean_b = (sum(x * y for x, y in zip(w, of, strict=True)) for of in (a, b))
    whole = sum(x * y @ z for x, y, z in zip(w, b, a, strict=True))
    u, s, vt = np.linalg.svd(whole)
    for k, rank in enumerate(RANKS):
        got = np.float64(assembled(end[k].adapters)["layers"]["q"]["b"][0]) @ end[k].adapters[
            "text_adapter"]["layers"]["q"]["a"][0]
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        np.testing.assert_allclose(got, best if name == "flexlora" else mean_b[:, :rank] @ mean_a[:rank], atol=2e-6)


def test_bytes_count_a_clients_own_rank():
    whole, ranked = (run_toy(toy_federation(make_strategy("fedavg", {"projector": "frozen"}), ranks=ranks))
                     for ranks in (None, RANKS))
    assert ranked.bytes_up == whole.bytes_up * sum(RANKS) // (3 * RANK)
    assert ranked.bytes_down == whole.bytes_down * sum(RANKS) // (3 * RANK)


def test_distances_are_those_of_the_products():
    given = loras()
    ranked = dataclasses.replace(make_strategy("pilot", {"ata": {"neighbors": 3}}), ranks_differ=True)
    np.testing.assert_allclose(ranked.distances(given), distances(given, 3, "product"), rtol=1e-6)


@pytest.mark.parametrize(("rank", "message"), [
    ({"a": 2}, r"model\.lora\.rank: no rank for client 'b'. Add it, or give '\*' for all others"),
    ({"a": 2, "c": 1}, r"model\.lora\.rank: unknown client 'c'. Known: a, b"),
])
def test_ranks_that_do_not_fit_the_clients(rank, message):
    with pytest.raises(InputError, match=message):
        prepare.client_ranks(rank, ["a", "b"])
    assert prepare.client_ranks({"*": 4, "b": 2}, ["a", "b", "c"]) == (4, 2, 4)


@pytest.mark.parametrize(("name", "params"), [("scaffold", {}), ("similarity", {}), ("fedex_lora", {}),
                                              ("fedavg", {"combine": "exact"})])
def test_strategies_that_need_one_rank(name, params):
    with pytest.raises(InputError, match=r"model\.lora\.rank: the clients' ranks differ, but .* needs one.*flexlora"):
        dataclasses.replace(make_strategy(name, params), ranks_differ=True)


# On the real model


MIXED = {"model": {"lora": {"rank": {"*": 4, "ocr_1": 2, "vqa_0": 8}, "alpha": 8}}}


@pytest.mark.long
def test_ranks_together_are_each_alone_on_the_real_model(setup):
    """Clients of ranks 2, 4 and 8 that train together get what each gets with LoRA of its own rank, to rounding."""
    ranks = (2, 4, 8)
    strategy = make_strategy("local")
    fed = dataclasses.replace(setup.federation, strategy=dataclasses.replace(strategy, ranks_differ=True),
                              clients=setup.federation.clients[:3], rank=8, ranks=ranks,
                              model=_with_scale(setup.federation.model, 16 / 8))
    start = prepare.initial_state(fed).population
    together, _ = train_phase(fed, {k: c.adapters for k, c in enumerate(start)}, 1, "plain", "plain")
    for k, rank in enumerate(ranks):
        alone = dataclasses.replace(fed, strategy=strategy, rank=rank, ranks=None,
                                    model=_with_scale(setup.federation.model, 16 / rank))
        lora = jax.tree_util.tree_map_with_path(
            lambda path, leaf, r=rank: leaf[..., :r, :] if path[-1].key == "a" else leaf[..., :r],
            start[k].adapters["text_adapter"])
        one, _ = train_phase(alone, {k: {"text_adapter": lora, "projector": start[k].adapters["projector"]}}, 1,
                             "plain", "plain")
        got = jax.tree_util.tree_map_with_path(
            lambda path, leaf, r=rank: leaf[..., :r, :] if path[-1].key == "a" else leaf[..., :r],
            together[k]["text_adapter"])
        assert tree_max_difference(got, one[k]["text_adapter"]) < 2e-5
        assert tree_max_difference(one[k]["text_adapter"], lora) > 1e-3


def _with_scale(model, scale):
    return dataclasses.replace(model, module=model.module.clone(lora_scale=scale))


@pytest.mark.parametrize(("name", "model"), [
    pytest.param(name, model, marks=mark) for mark, name, model in [
        (pytest.mark.long, "flora", MIXED["model"]), (pytest.mark.long, "flexlora", MIXED["model"]),
        (pytest.mark.long, "fedex_lora", {}), (pytest.mark.long, "pilot", MIXED["model"])]])
def test_a_run_and_its_export(name, model, tmp_path):
    """A run on the real model resumes, answers, and exports to PEFT: torch's logits are those of pilot_jax."""
    run = pilot_jax.simulate(small_config(strategy={"name": name}, model=model, federation={"rounds": 2}),
                             out=tmp_path / "run")
    back = pilot_jax.restore(tmp_path / "run")
    for one, other in zip(run.population, back.population, strict=True):
        assert tree_max_difference(one.adapters, other.adapters) == 0
    client = "ocr_1"
    lost = export_client(back, client, tmp_path / "out")
    assert lost < 1e-6
    if name != "pilot":
        _check_against_peft(back, client, tmp_path / "out")
        _check_merged(back, client, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    if name in ("flexlora", "pilot"):
        assert (config["r"], config["lora_alpha"]) == (2, 8)
    lost = export_client(back, client, tmp_path / "small", 1)
    assert 0 < lost < 1 and json.loads((tmp_path / "small" / "adapter_config.json").read_text())["r"] == 1
    assert f"{lost:.2g}" in (tmp_path / "small" / "README.md").read_text()


def _check_against_peft(run, client, folder):
    import torch

    state = run.state(client)
    reference = AutoModelForImageTextToText.from_pretrained(model_directory("embedded"), dtype=torch.float32)
    reference = get_peft_model(reference, LoraConfig.from_pretrained(folder))
    set_peft_model_state_dict(reference, load_file(folder / "adapter_model.safetensors"))
    ids = np.asarray([run.tokenizer("USER: what colour is the 3? ASSISTANT: it is red")["input_ids"]])
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(ids)).logits.numpy()
    fed = run.federation
    ours = fed.model.module.apply(variables(fed.model.base, used_adapters(fed, state)), jnp.asarray(ids),
                                  jnp.ones_like(ids), None, state.stage, 0, method="logits")
    plain = fed.model.logits(ids, np.ones_like(ids), None)
    assert np.abs(np.asarray(plain) - expected).max() > 1e-3  # the adapters matter
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def _check_merged(run, client, folder):
    """Each weight of the merged model is the float16 nearest to that of the base plus the exported LoRA."""
    merge_client(run, client, folder.with_name("merged"))
    config, lora = json.loads((folder / "adapter_config.json").read_text()), load_file(
        folder / "adapter_model.safetensors")
    base, merged = (load_file(at / "model.safetensors") for at in (model_directory("embedded"),
                                                                   folder.with_name("merged")))
    changed = 0
    for name, a in lora.items():
        if name.endswith(".lora_A.weight"):
            b = lora[name.replace(".lora_A.", ".lora_B.")].double()
            key = name.removeprefix("base_model.model.model.language_model.").replace(".lora_A.", ".")
            key = f"language_model.model.{key}"
            exact = base[key].double() + config["lora_alpha"] / config["r"] * (b @ a.double())
            assert bool(((merged[key].double() - exact).abs() <= 0.51 * 2**-10 * exact.abs() + 1e-6).all()), key
            changed += int((merged[key] != base[key]).sum())
    assert changed > 1000


def test_smallest_rank_of_a_sum():
    """A residual of rank 7 beside a LoRA of rank 2 is written with the rank that both have together, and no more."""
    lora = jax.tree.map(lambda leaf: leaf[0], loras())
    change = {"layers": {n: {"a": np.concatenate([p["a"], 0 * p["a"]], 1), "b": np.concatenate([p["b"], p["b"]], 2)}
                         for n, p in jax.tree.map(lambda leaf: leaf[0], loras(5))["layers"].items()}}
    whole, lost = peft_lora({"text_adapter": lora, "text_residual": change}, R)
    assert whole["layers"]["q"]["a"].shape[-2] == 4 and lost < 1e-12
    for name, want in products(lora).items():
        np.testing.assert_allclose(products(whole)[name], want + products(change)[name], atol=1e-5)
    cut, lost = smallest(whole, 1)
    rest = sum(np.sum((products(cut)[n] - v) ** 2) for n, v in products(whole).items())
    assert lost == pytest.approx((rest / sum(np.sum(v**2) for v in products(whole).values())) ** 0.5, rel=1e-5)
