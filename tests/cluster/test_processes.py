"""Tests that several processes under `jax.distributed`, connected by gloo, give the results of one process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, small_config, tree_max_difference

from pilot_jax.config import MeshConfig
from pilot_jax.errors import InputError
from pilot_jax.federation.state import stack
from pilot_jax.parallel import processes
from pilot_jax.parallel.mesh import make_mesh, spread
from pilot_jax.runs import prepare, restore

RATES = {"optimizer": "sgd", "lr_connector": 0.005, "lr_lora_stage1": 0.005, "lr_lora_stage2": 0.005}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def python(*arguments: object) -> subprocess.Popen:
    """Starts Python in a new process that has one CPU device."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def command(config: Path, out: Path, *more: object) -> subprocess.Popen:
    return python("-m", "pilot_jax", "run", config, "--out", out, *more)


def finished(processes: list[subprocess.Popen]) -> list[str]:
    try:
        texts = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(err[-2000:] for _, err in texts)
    return [out for out, _ in texts]


def agree(alone, run) -> None:
    for a, b in zip(alone.population, run.population, strict=True):
        assert tree_max_difference(a.adapters, b.adapters) <= 1e-5
    for key in ("score_by_client", "bytes_up", "bytes_down", "client_steps"):
        assert run.summary[key] == alone.summary[key], key


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Returns (config file, run directory, run) of one process on one device."""
    folder = tmp_path_factory.mktemp("one")
    config = folder / "config.yaml"
    config.write_text(small_config(train=RATES, system={"client_chunk": 1, "unroll": 1}).to_yaml())
    finished([command(config, folder / "run", "--set", "system.client_devices=1")])
    return config, folder / "run", restore.restore(folder / "run")


# The command, after which a process prints which images it has read, and how many of them before training.
READS = """
import json
from pilot_jax import cli
from pilot_jax.data import features
from pilot_jax.runs import simulate
seen, before, read, compute = [], [], features.read_image, simulate.compute_all_features
features.read_image = lambda sample, limits: (seen.append(sample.id), read(sample, limits))[1]
simulate.compute_all_features = lambda setup: (compute(setup), before.append(len(seen)))
try:
    cli.main()
finally:
    print("\\n" + json.dumps({"seen": seen, "before": before}))
"""


@pytest.mark.long
def test_four_processes_give_what_one_gives(one, tmp_path):
    """Two processes form each row of the mesh and divide the base's weights. Only the writer writes files and prints,
    and its run directory can be read on one device. Every image is read in one process only; each reads its share."""
    config, folder, alone = one
    port, sets = free_port(), ("--set", "system.mesh.clients=2", "--set", "system.mesh.fsdp=2")
    texts = finished([python("-c", READS, "run", config, "--out", tmp_path / "4", *sets, "--coordinator",
                             f"127.0.0.1:{port}", "--num-processes", 4, "--process-id", i) for i in range(4)])
    assert "Run directory" in texts[0] and not any("client steps" in text for text in texts[1:])
    agree(alone, restore.restore(tmp_path / "4"))
    lines = [(at / "metrics.jsonl").read_text().count("\n") for at in (folder, tmp_path / "4")]
    assert lines[0] == lines[1] > 18
    told = [json.loads(text.splitlines()[-1]) for text in texts]
    assert all(process["before"] == [0] for process in told)
    samples = prepare.load_samples(small_config())
    for split in ("train", "test"):
        wanted = {s.id for s in samples if s.split == split}
        read = [[i for i in process["seen"] if i in wanted] for process in told]
        assert sorted(i for share in read for i in share) == sorted(wanted), split
        assert min(map(len, read)) > 0.7 * len(wanted) / 4, split
    assert {i for process in told for i in process["seen"]} == {s.id for s in samples if s.split != "validation"}


@pytest.mark.long
def test_two_processes_are_interrupted_and_one_goes_on(one, tmp_path):
    """After SIGTERM following their first phase, both processes stop at the same chunk and save. One process on one
    device then continues to the results of an uninterrupted run."""
    config, folder_of_one, alone = one
    port, folder = free_port(), tmp_path / "interrupted [1]"
    both = [command(config, folder, "--set", "system.mesh.clients=2", "--coordinator", f"127.0.0.1:{port}",
                    "--num-processes", 2, "--process-id", i) for i in range(2)]
    metrics = folder / "metrics.jsonl"
    for _ in range(3000):
        if (metrics.is_file() and "bytes_up" in metrics.read_text()) or any(p.poll() is not None for p in both):
            break
        time.sleep(0.1)
    for process in both:
        process.send_signal(signal.SIGTERM)
    texts = [process.communicate(timeout=600) for process in both]
    assert [p.returncode for p in both] == [143, 143], texts
    assert "--resume" in texts[0][1] and "--resume" not in texts[1][1] and not (folder / "summary.json").exists()
    parts = {part for part in (folder / "checkpoints" / "resume").rglob("ocdbt.process_*")}
    assert {part.name for part in parts} == {"ocdbt.process_0", "ocdbt.process_1"}  # each has its own clients
    text = finished([command(config, folder, "--resume")])[0]
    assert "system.mesh.clients: 2 → 1: results agree to rounding" in " ".join(text.split())
    agree(alone, restore.restore(folder))
    assert metrics.read_text().count("\n") == (folder_of_one / "metrics.jsonl").read_text().count("\n")


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_one_of_two_processes_is_killed(one, tmp_path, victim):
    """The other one ends within 30 s with one line. One process on one device then continues to the results of an
    uninterrupted run."""
    config, _, alone = one
    port, folder = free_port(), tmp_path / "killed"
    both = [command(config, folder, "--set", "system.mesh.clients=2", "--coordinator", f"127.0.0.1:{port}",
                    "--num-processes", 2, "--process-id", i) for i in range(2)]
    for _ in range(3000):
        resume = folder / "checkpoints" / "resume"
        if any(resume.glob("0*[0-9]")) or any(p.poll() is not None for p in both):
            break
        time.sleep(0.1)
    both[victim].send_signal(signal.SIGKILL)
    _, err = both[1 - victim].communicate(timeout=30)
    both[victim].communicate(timeout=30)
    assert both[1 - victim].returncode == 1 and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1 and "--resume" in err, err
    finished([command(config, folder, "--resume")])
    agree(alone, restore.restore(folder))


SERVER = """
import dataclasses, json, sys
sys.path.insert(0, "tests")
port, process, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
import jax
jax.config.update("jax_num_cpu_devices", 2)
from pilot_jax.parallel import processes
processes.connect(f"127.0.0.1:{port}", 2, process)
import numpy as np
from conftest import small_config, tree_max_difference
from pilot_jax.runs import prepare, simulate
from pilot_jax.parallel.mesh import spread
from pilot_jax.federation import rounds
from pilot_jax.federation.cohort import Cohort
from pilot_jax.federation.strategies import make_strategy
def seen(out):
    # The factors of a change of the weights are unique only up to directions that add nothing.
    if "residual" not in out.server:
        return out
    pairs = out.server["residual"]["layers"].values()
    downloads = {n: t for n, t in out.downloads.items() if n != "text_residual"}
    return downloads, {**out.server, "residual": [pair["b"] @ pair["a"] for pair in pairs]}

sections = json.loads(sys.argv[4])
processes.AT_ONCE = 2**18  # so that some arrays return from the devices one row at a time
mesh = {"clients": 2, "fsdp": 2}
setup = prepare.prepare(small_config(system={"mesh": mesh}))
told = {}
cases = [(name, {}) for name in ("fedadam", "pilot", "scaffold", "similarity", "trimmed_mean", "fedamp",
                                 "fedmosaic")]
cases += [("pilot", {"ata": {"space": "product"}}), ("pilot", {"combine": "product"})]
cases += [(name, {}) for name in ("flexlora", "fedrot_lora", "fedex_lora", "flora", "ditto", "rolora",
                                  "fedalt", "fedlease", "split_half", "pilot_split_half")]
for name, settings in cases:
    its = prepare.with_strategy(setup, make_strategy(name, settings)).federation
    state = prepare.initial_state(its)
    shared, rng = its.strategy.roles().select(state.population[0].adapters, "shared"), np.random.default_rng(0)
    uploads = jax.tree.map(lambda x: (x + 0.1 * rng.normal(size=(20, *x.shape))).astype(np.float32), shared)
    who = np.arange(1, 21), np.arange(20) % 3, np.arange(20), 2
    starts = jax.tree.map(lambda x: (x + 0.1 * rng.normal(size=(20, *x.shape))).astype(np.float32), shared)
    sketches = {"gradient_sketch": {name: rng.normal(size=(20, 2, 64)).astype(np.float32)
                                    for name in its.strategy.measured}}

    def aggregated(mesh):
        cohort = Cohort(spread(uploads, mesh), *who)
        if its.strategy.splits_halves:
            cohort = dataclasses.replace(cohort, uploads=spread(uploads | sketches, mesh), starts=spread(starts, mesh))
            cohort, _ = rounds.with_ratio(cohort, {}, 20)
        return its.strategy.aggregate(cohort, state.server)

    alone, together = aggregated(None), aggregated(its.server_mesh)
    parts = [s.data.size / leaf.size for leaf in jax.tree.leaves(spread(uploads, its.server_mesh))
             for s in leaf.addressable_shards]
    told[name + json.dumps(settings)] = [
        tree_max_difference(*(seen(processes.to_host(out)) for out in (alone, together))), max(parts)]
config = small_config(**sections, system={"mesh": mesh, "client_chunk": 1, "unroll": 1})
simulate.simulate(config, out=folder)
print(json.dumps(told))
"""


@pytest.mark.long
def test_the_server_mixes_on_the_devices_of_all(tmp_path):
    """Every kind of aggregation agrees for 20 uploads divided among four devices of two processes. After a whole run of
    a strategy without local subtrees, all clients have one model."""
    port, sections = free_port(), {"train": RATES, "strategy": {"name": "fedadam"}}
    texts = finished([python("-c", SERVER, port, i, tmp_path / "2", json.dumps(sections)) for i in range(2)])
    told = json.loads(texts[0].splitlines()[-1])
    for name, (difference, part) in told.items():
        assert difference <= 1e-5 and part == 1 / 4, name
    run = restore.restore(tmp_path / "2")
    assert all(tree_max_difference(client.adapters, run.population[0].adapters) == 0 for client in run.population)
    assert run.summary["bytes_up"] == run.summary["bytes_down"] > 0 and len(run.summary["score_by_client"]) == 9


@pytest.mark.parametrize(("arguments", "message"), [
    (("127.0.0.1:1", 2, None), "go together"), ((None, 2, 0), "go together"), (("127.0.0.1:1", 2, 2), "0 to 1")])
def test_incomplete_addresses_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        processes.connect(*arguments)


def test_a_cohort_is_in_memory_once():
    """On CPU the server uses the arrays in which uploads are stacked without a copy."""
    for dtype in (np.float32, jnp.bfloat16):
        stacked = stack([{"a": np.full((3, 5), k, dtype)} for k in range(7)])
        assert stacked["a"].shape == (7, 3, 5) and stacked["a"].dtype == dtype and (stacked["a"][6] == 6).all()
        assert spread(stacked, None)["a"].unsafe_buffer_pointer() == stacked["a"].ctypes.data


def test_nothing_over_clients_is_nothing():
    """A strategy without local subtrees, such as FedAvg, saves an empty tree."""
    assert processes.over_clients({}, make_mesh(MeshConfig())) == {}
