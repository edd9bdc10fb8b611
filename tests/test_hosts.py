"""Several processes under `jax.distributed`, over gloo on this machine, give what one process gives."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import small_config, tree_max_difference

from pilot_jax import hosts
from pilot_jax.config import MeshConfig
from pilot_jax.errors import InputError
from pilot_jax.federation import simulation
from pilot_jax.federation.sharding import make_mesh

ROOT = Path(__file__).parent.parent
RATES = {"optimizer": "sgd", "lr_connector": 0.005, "lr_lora_stage1": 0.005, "lr_lora_stage2": 0.005}


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def command(config: Path, out: Path, *more: object) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    return subprocess.Popen([sys.executable, "-m", "pilot_jax", "run", config, "--out", out, *map(str, more)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def finished(processes: list[subprocess.Popen]) -> list[str]:
    try:
        texts = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(err[-2000:] for _, err in texts)
    return [out for out, _ in texts]


def test_processes_give_what_one_gives(tmp_path):
    """Two processes, a row of the mesh each; four, the base's weights divided among two in each row. The writer alone
    leaves files and speaks, and the run directory can be read on one device."""
    config = tmp_path / "config.yaml"
    config.write_text(small_config(train=RATES, system={"client_chunk": 1, "unroll": 1}).to_yaml())
    one = tmp_path / "one"
    finished([command(config, one, "--set", "system.client_devices=1")])
    alone = simulation.restore(one)
    for count, mesh in ((2, {"clients": 2}), (4, {"clients": 2, "fsdp": 2})):
        port, folder = free_port(), tmp_path / f"{count}"
        sets = [x for axis, size in mesh.items() for x in ("--set", f"system.mesh.{axis}={size}")]
        texts = finished([command(config, folder, *sets, "--coordinator", f"127.0.0.1:{port}", "--num-processes", count,
                                  "--process-id", i) for i in range(count)])
        assert "Run directory" in texts[0] and not any("client steps" in text for text in texts[1:])
        run = simulation.restore(folder)
        for a, b in zip(alone.population, run.population, strict=True):
            assert tree_max_difference(a.adapters, b.adapters) <= 1e-5
        for key in ("score_by_client", "bytes_up", "bytes_down", "client_steps"):
            assert run.summary[key] == alone.summary[key], key
        lines = [(folder / "metrics.jsonl").read_text().count("\n") for folder in (one, folder)]
        assert lines[0] == lines[1] > 18
    interrupted_on_a_mesh(config, tmp_path / "interrupted", one, alone)


def interrupted_on_a_mesh(config, folder, one, alone):
    """SIGTERM to both of two processes after their first phase: they agree on where to stop; the writer saves; one
    process on one device goes on to what it would have reached alone."""
    port = free_port()
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
    assert {part.name for part in parts} == {"ocdbt.process_0", "ocdbt.process_1"}  # each has written its clients
    text = finished([command(config, folder, "--resume")])[0]
    assert "system.mesh.clients: 2 → 1: results agree to rounding" in " ".join(text.split())
    run = simulation.restore(folder)
    for a, b in zip(alone.population, run.population, strict=True):
        assert tree_max_difference(a.adapters, b.adapters) <= 1e-5
    for key in ("score_by_client", "bytes_up", "bytes_down", "client_steps"):
        assert run.summary[key] == alone.summary[key], key
    assert metrics.read_text().count("\n") == (one / "metrics.jsonl").read_text().count("\n")


OWN_IMAGES = """
import json, sys
sys.path.insert(0, "tests")
port, process = sys.argv[1], int(sys.argv[2])
import jax
jax.config.update("jax_num_cpu_devices", 1)
from pilot_jax import hosts
hosts.start(f"127.0.0.1:{port}", 4, process)
from conftest import small_config
from pilot_jax.data import features
from pilot_jax.federation import simulation
from pilot_jax.federation.examination import evaluate
seen, read = [], features.read_image
features.read_image = lambda sample, limits: (seen.append(sample.id), read(sample, limits))[1]
mesh = {"clients": 2, "fsdp": 2}
fed, tokenizer = simulation.prepare(small_config(system={"mesh": mesh, "client_chunk": 1, "unroll": 1}))
simulation.see_everything(fed)
before = len(seen)
rounds = [lambda e: None, lambda r: None, lambda *a: None]
state = simulation.initial_state(fed)
state = simulation.run_round(fed, state, 1, *rounds)  # two stages: the second finds what the first has seen
trained = list(seen)
evaluate(fed, tokenizer, state.population)
print(json.dumps({"before": before, "trained": trained, "asked": seen[len(trained):]}))
"""


def test_each_process_reads_its_own_clients_images():
    """Two rows of two processes: every image is read in one process alone, and each reads its share."""
    port = free_port()
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    how = {"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    texts = finished([subprocess.Popen([sys.executable, "-c", OWN_IMAGES, str(port), str(i)], **how) for i in range(4)])
    told = [json.loads(text.splitlines()[-1]) for text in texts]
    samples = simulation.load_samples(small_config())
    for key, split in (("trained", "train"), ("asked", "test")):
        read = [i for process in told for i in process[key]]
        assert sorted(read) == sorted(s.id for s in samples if s.split == split), key
        shares = [len(process[key]) for process in told]
        assert min(shares) > 0.7 * len(read) / 4, shares
    assert not any(process["before"] for process in told)


@pytest.mark.parametrize(("arguments", "message"), [
    (("127.0.0.1:1", 2, None), "go together"), ((None, 2, 0), "go together"), (("127.0.0.1:1", 2, 2), "0 to 1")])
def test_incomplete_addresses_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        hosts.start(*arguments)


def test_nothing_over_clients_is_nothing():
    """A strategy without local subtrees, as FedAvg, has an empty tree to save."""
    assert hosts.over_clients({}, make_mesh(MeshConfig())) == {}
