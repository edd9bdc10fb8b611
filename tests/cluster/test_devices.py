"""Tests that a phase gives the same adapters on any number of CPU devices, and of the flags that a mesh asks for."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from pilot_jax.config import SystemConfig
from pilot_jax.parallel import devices

DEVICES = """
import sys
sys.path.insert(0, "tests")
from conftest import small_config
from pilot_jax.config import SystemConfig
from pilot_jax.parallel.devices import split_cpu
split_cpu(SystemConfig(client_devices=int(sys.argv[1])))
import jax, numpy as np
from pilot_jax.runs import prepare
from pilot_jax.testing.phases import train_phase
# A length_spread of 1.2 instead of 4 gives two buckets, of three and of six clients.
system = {"client_chunk": 2, "length_spread": 1.2}
setup = prepare.prepare(small_config(system=system, train={"adam_epsilon": 1e-3}))
fed = setup.federation
adapters = dict.fromkeys(range(9), prepare.initial_adapters(fed))
after, _ = train_phase(fed, adapters, 1, "stage2", "stage2", setup.executor)
np.savez(sys.argv[2], *[np.asarray(x) for c in sorted(after) for x in jax.tree.leaves(after[c])])
print(jax.device_count(), 1 if fed.mesh is None else fed.mesh.size)
"""


@pytest.mark.long
def test_devices_change_nothing(tmp_path):
    """Nine clients on one and on four CPU devices get equal adapters to 1e-5. Four divides neither bucket's size."""
    results = {}
    for count in (1, 4):
        env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run([sys.executable, "-c", DEVICES, str(count), tmp_path / f"{count}.npz"],
                              capture_output=True, text=True, env=env, check=True,
                              cwd=ROOT)
        assert done.stdout.split() == [str(count)] * 2
        with np.load(tmp_path / f"{count}.npz") as arrays:
            results[count] = [arrays[n] for n in arrays.files]
    assert len(results[1]) == len(results[4]) > 9
    for a, b in zip(results[4], results[1], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_mesh_asks_xla_to_send_while_it_computes(monkeypatch):
    """Once, beside other flags, and not against the user's own value, nor for one device, nor once JAX has started."""
    one, several = SystemConfig(), SystemConfig(mesh={"fsdp": 8})
    monkeypatch.setattr(devices, "has_started", lambda: False)
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    devices.overlap_collectives(one)
    assert os.environ["XLA_FLAGS"] == "--xla_a=1"
    for _ in range(2):
        devices.overlap_collectives(several)
        assert os.environ["XLA_FLAGS"] == "--xla_a=1 --xla_gpu_enable_latency_hiding_scheduler=true"
    own = "--xla_gpu_enable_latency_hiding_scheduler=false"
    monkeypatch.setenv("XLA_FLAGS", own)
    devices.overlap_collectives(several)
    assert os.environ["XLA_FLAGS"] == own
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(devices, "has_started", lambda: True)
    devices.overlap_collectives(several)
    assert os.environ["XLA_FLAGS"] == ""
