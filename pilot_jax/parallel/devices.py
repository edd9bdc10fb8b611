"""What JAX is told before it starts, and how many devices train.

The only place that touches XLA_FLAGS and `jax.config`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from typing import Any

import jax

from pilot_jax.config import SystemConfig
from pilot_jax.errors import InputError

PROGRAMS_KEPT = 16 * 2**30  # bytes of `system.compilation_cache`; the least recently used go first
DETERMINISTIC = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")


def has_started() -> bool:
    """Whether JAX has looked for devices, after which flags are not read any more."""
    name, value = "jax_num_cpu_devices", jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    try:
        jax.config.update(name, value + 1 if value > 0 else 1)  # refused from then on; there is no public question
    except RuntimeError:
        return True
    jax.config.update(name, value)
    return False


def ask_for_determinism(system: SystemConfig) -> None:
    """Have XLA choose the same algorithms in every run, if `system.deterministic`; CPU and TPU do without.

    Raises:
        InputError: on a GPU, when JAX has started without.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in DETERMINISTIC if flag not in flags]
    if not system.deterministic or not missing:
        return
    if not has_started():
        os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()
    elif jax.default_backend() == "gpu":
        raise InputError(f"system.deterministic: JAX has started without it. Set XLA_FLAGS=\"{' '.join(missing)}\" "
                         "before Python starts.")


def split_cpu(system: SystemConfig, processes: int = 1) -> None:
    """Have JAX see the CPU as what `mesh` or `client_devices` ask for (default: one device per core). Too late once JAX
    has started; then nothing. A mesh is divided among the processes.

    On two cores, two devices with a client each train about a third more than one device with both: what XLA does not
    spread over threads runs side by side all the same.
    """
    count = -(-system.mesh.devices // processes) if system.mesh.devices > 1 else system.client_devices
    # Whatever the reason: JAX has started, or XLA_FLAGS settle it already.
    with contextlib.suppress(RuntimeError, ValueError):
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            # macOS and Windows have no affinity; there every core counts.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            jax.config.update("jax_num_cpu_devices", count or cores)


def client_devices(wanted: int | None, base: Mapping[str, Any]) -> int:
    """How many devices train clients side by side.

    By default, on CPU, all there are, as long as a copy of the base for each is small change; elsewhere one.
    """
    there = jax.device_count()
    if wanted is not None:
        if wanted > there:
            raise InputError(f"system.client_devices: {wanted} asked for, {there} there. Lower it; on CPU, `run` makes "
                             "as many as there are cores before JAX starts.")
        return wanted
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(base)) < 500e6
    return there if jax.default_backend() == "cpu" and small else 1
