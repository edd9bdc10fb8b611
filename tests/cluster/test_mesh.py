"""Tests of device meshes: every mesh gives the results of one device, and the server never gathers the uploads."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


def on_devices(count: int, code: str, *arguments: object) -> str:
    """Runs `code` in a process that sees the CPU as `count` devices, and returns its output."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env=env,
                          cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


FEDERATION = """
import json, sys
sys.path.insert(0, "tests")
from conftest import small_config, tree_max_difference
import jax
import numpy as np
from pilot_jax.runs import prepare
from pilot_jax.federation import rounds
from pilot_jax.evaluation.personalised import evaluate

def seen(adapters):
    # Sketches are sums of square roots, of rounding too; what they are read for, `ratios`, is compared instead.
    adapters = {name: tree for name, tree in adapters.items() if name != "gradient_sketch"}
    # The factors of a change of the weights are unique only up to directions that add nothing.
    if "text_residual" in adapters:
        pairs = adapters["text_residual"]["layers"].values()
        adapters = {**adapters, "text_residual": [pair["b"] @ pair["a"] for pair in pairs]}
    return adapters

def ratios(state):
    return [sums["apart"] / sums["noise"] for sums in state.server.get("evidence", {}).values()]

def run(mesh, **sections):
    # Steps small enough that rounding is not amplified: at 0.02 the second step of stage 2 multiplies it by 100.
    rates = {"optimizer": "sgd", "lr_connector": 0.005, "lr_lora_stage1": 0.005, "lr_lora_stage2": 0.005}
    setup = prepare.prepare(small_config(**sections | {"train": rates | sections.get("train", {})}, system={
        "mesh": dict(zip(("clients", "fsdp", "tensor"), mesh)), "client_chunk": 1, "client_devices": 1}))
    fed = setup.federation
    state = prepare.initial_state(fed)
    start = state.population
    state, = rounds.run_round([fed], [state], setup.executor)
    held = max(sum(s.data.nbytes for s in leaf.addressable_shards if s.device == jax.devices()[0])
               / leaf.nbytes for leaf in jax.tree.leaves(fed.model.base["decoder"]["layers"]) if leaf.ndim > 2)
    return start, state, evaluate(setup.evaluation, state.population), held

sections = json.loads(sys.argv[2])
start, alone, scores, held = run((1, 1, 1), **sections)
out = {"moved": tree_max_difference(seen(start[0].adapters), seen(alone.population[0].adapters)), "meshes": {}}
for mesh in json.loads(sys.argv[1]):
    _, state, same, held = run(mesh, **sections)
    out["meshes"]["x".join(map(str, mesh))] = {
        "difference": max(tree_max_difference(seen(a.adapters), seen(b.adapters))
                          for a, b in zip(alone.population, state.population, strict=True)),
        "ratios": max([0.0, *(float(np.abs(a - b).max()) for a, b in zip(ratios(alone), ratios(state), strict=True))]),
        "same_scores": same == scores, "held": held,
        "bytes": (state.bytes_up, state.bytes_down) == (alone.bytes_up, alone.bytes_down)}
print(json.dumps(out))
"""


def agree_on_meshes(parts, strategy):
    """Asserts that a round, its bytes and its answers agree; `parts`: the share of the base on a device, by mesh."""
    meshes = json.dumps([[int(n) for n in mesh.split("x")] for mesh in parts])
    out = json.loads(on_devices(8, FEDERATION, meshes, json.dumps({"strategy": {"name": strategy}})).splitlines()[-1])
    assert out["moved"] > 1e-3
    assert set(out["meshes"]) == set(parts)
    for name, got in out["meshes"].items():
        assert got["difference"] <= 1e-5 and got["ratios"] <= 1e-4, name
        assert got["same_scores"] and got["bytes"], name
        assert got["held"] == parts[name], name


FORCING = """
import json, sys
sys.path.insert(0, "tests")
from conftest import small_config
import jax, numpy as np
from pilot_jax.evaluation.answers import Examinee
from pilot_jax.evaluation.personalised import base_prompts
from pilot_jax.evaluation.teacher_forced import teacher_forced
from pilot_jax.runs import prepare

def forced(mesh):
    setup = prepare.prepare(small_config(
        strategy={"name": "fedavg"}, eval={"scoring": "teacher_forced"},
        system={"mesh": dict(zip(("clients", "fsdp", "tensor"), mesh)), "client_chunk": 1, "client_devices": 1}))
    prompts, rng = base_prompts(setup.evaluation, 10), np.random.default_rng(0)
    start = prepare.initial_adapters(setup.federation)
    models = [Examinee(start | {"text_adapter": jax.tree.map(
        lambda leaf: leaf + scale * rng.normal(size=leaf.shape).astype(np.float32), start["text_adapter"])},
        "plain", 0, "base", prompts) for scale in (0.01, 0.05, 0.1)]
    found = teacher_forced(setup.federation.model, models, setup.evaluation.width, 4)
    return np.stack([[one.exact, one.tokens] for one in found])

alone = forced((1, 1, 1))
print(json.dumps({"right": float(alone[:, 0].mean()), "differences": [
    float(np.abs(forced(mesh) - alone).max()) for mesh in json.loads(sys.argv[1])]}))
"""


@pytest.mark.long
def test_teacher_forcing_on_a_mesh():
    """Three models, which neither 8 nor 2 divides, have on each mesh the results that they have on one device."""
    out = json.loads(on_devices(8, FORCING, "[[8, 1, 1], [2, 2, 2]]").splitlines()[-1])
    assert 0.2 < out["right"] < 0.8 and len(out["differences"]) == 2 and max(out["differences"]) < 1e-6


RANKS = {"lora": {"rank": {"*": 4, "ocr_0": 2}, "alpha": 8}}


@pytest.mark.long
@pytest.mark.parametrize(("name", "model"), [("fedex_lora", {}), ("flora", RANKS), ("flexlora", RANKS)])
def test_ways_to_combine_on_a_mesh(name, model):
    """A change of the frozen weights and ranks that differ agree on eight devices with one."""
    sections = json.dumps({"strategy": {"name": name}, "model": model})
    out = json.loads(on_devices(8, FEDERATION, "[[2, 2, 2]]", sections).splitlines()[-1])
    got = out["meshes"]["2x2x2"]
    assert out["moved"] > 1e-3 and got["difference"] <= 2e-5 and got["same_scores"] and got["bytes"]


@pytest.mark.long
def test_parts_of_batches_and_dropout_on_a_mesh():
    """Parts of two samples, which the mesh divides among devices, and masks agree on eight devices with one."""
    sections = json.dumps({"strategy": {"name": "fedavg"}, "train": {"microbatch": 2, "lora_dropout": 0.2}})
    out = json.loads(on_devices(8, FEDERATION, "[[2, 2, 2]]", sections).splitlines()[-1])
    got = out["meshes"]["2x2x2"]
    assert out["moved"] > 1e-3 and got["difference"] <= 2e-5 and got["same_scores"] and got["bytes"]


@pytest.mark.parametrize("parts", [pytest.param({"2x2x2": 1 / 4}, marks=pytest.mark.slow),
                                   pytest.param({"8x1x1": 1.0, "1x4x2": 1 / 8}, marks=pytest.mark.long)], ids=", ".join)
def test_meshes_give_what_one_device_gives(parts):
    """Stages, mixing and answers agree for nine clients, which neither 8 nor 2 divides; a device has only its part."""
    agree_on_meshes(parts, "pilot")


@pytest.mark.long
@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_quantised_base_on_a_mesh(base):
    """A device has its part of the quantised weights; scales that cannot be divided stay whole."""
    sections = json.dumps({"strategy": {"name": "fedavg"}, "model": {"base": base}})
    out = json.loads(on_devices(8, FEDERATION, "[[2, 2, 2]]", sections).splitlines()[-1])
    got = out["meshes"]["2x2x2"]
    assert out["moved"] > 1e-3 and got["difference"] <= 1e-5 and got["same_scores"] and got["held"] <= 1 / 2


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["fedlease", "fedalt", "ditto", "fedamp", "rolora", "fedmosaic", "split_half",
                                      "pilot_split_half"])
def test_other_strategies_on_a_mesh(strategy):
    agree_on_meshes({"2x2x2": 1 / 4}, strategy)


MIXING = """
import json, re, sys
import jax, numpy as np
from pilot_jax.config import MeshConfig
from pilot_jax.kernels import pairwise
from pilot_jax.federation import distances, mixing
from pilot_jax.parallel.mesh import AXES, make_mesh, on_parts, spread

rng = np.random.default_rng(0)
cohort, layers, rank, width = 40, 4, 4, 96  # 40 is above EVERY_PAIR, so that a Gram matrix selects the pairs
uploads = {"layers": {name: {"a": rng.normal(size=(cohort, layers, rank, width)).astype(np.float32),
                             "b": rng.normal(size=(cohort, layers, 72, rank)).astype(np.float32)} for name in "qv"}}
flat = np.concatenate([x.reshape(cohort, -1) for x in jax.tree.leaves(uploads)], 1).astype(np.float64)
factors = np.sqrt(((flat[:, None] - flat[None]) ** 2).sum(-1))
whole = np.stack([np.concatenate([np.einsum("ldr,lri->ldi", *(pair[n][s].astype(np.float64) for n in "ba")).ravel()
                                  for pair in uploads["layers"].values()]) for s in range(cohort)])
product = np.sqrt(((whole[:, None] - whole[None]) ** 2).sum(-1))

def sent(compiled):
    return sorted(set(re.findall("all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter",
                                 compiled.as_text())))

out = {}
for sizes in ((8, 1, 1), (2, 2, 2), (1, 4, 2)):
    mesh = make_mesh(MeshConfig(**dict(zip(AXES, sizes, strict=True))))
    placed = spread(uploads, mesh)
    leaf = placed["layers"]["q"]["a"]
    gram = on_parts(pairwise.factor_gram, (leaf,)).lower(leaf).compile()
    weights = mixing.ata_weights(np.float32(factors), np.ones(cohort), neighbors=3)
    mixed = jax.jit(mixing.apply).lower(weights, placed).compile()
    expected = np.asarray(weights, np.float64) @ flat
    got = np.concatenate([np.asarray(x).reshape(cohort, -1) for x in jax.tree.leaves(mixing.apply(weights, placed))], 1)
    near = {space: np.asarray(distances.distances(placed, 3, space)) for space in ("factors", "product")}
    near_rows = np.argsort(factors + np.eye(cohort) * 1e9, 1)[:, :3]
    at = np.arange(cohort)[:, None], near_rows
    out["x".join(map(str, sizes))] = {
        "factors": float(np.max(np.abs(near["factors"][at] / factors[at] - 1))),
        "product": float(np.max(np.abs(near["product"] - product)) / product.max()),
        "mixed": float(np.max(np.abs(got - expected))),
        "gram_sends": sent(gram), "mixing_sends": sent(mixed),
        "gram_arguments": gram.memory_analysis().argument_size_in_bytes / leaf.nbytes,
        "mixing_arguments": mixed.memory_analysis().argument_size_in_bytes / flat.astype(np.float32).nbytes}
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def mixing():
    return json.loads(on_devices(8, MIXING).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["8x1x1", "2x2x2", "1x4x2"])
def test_mixing_on_a_mesh(mixing, mesh):
    """Distances and mixed adapters agree with float64. Each device has an eighth of the uploads, and only the sums of
    Gram matrices go from device to device."""
    got = mixing[mesh]
    assert got["factors"] <= 1e-5 and got["product"] <= 1e-5 and got["mixed"] <= 1e-5
    assert got["gram_sends"] == ["all-reduce"] and got["mixing_sends"] == []
    assert got["gram_arguments"] == 1 / 8
    assert got["mixing_arguments"] < 1 / 8 + 0.02  # every device also has the mixing matrix
