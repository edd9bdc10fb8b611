"""JAX's settings, most of which must be made before it starts, and how many devices train.

The only file that touches XLA_FLAGS, `jax.config` and `jax.default_backend`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import jax
from jaxtyping import PyTree

from pilot_jax.config import SystemConfig
from pilot_jax.errors import InputError

PROGRAMS_KEPT = 16 * 2**30  # bytes of `system.compilation_cache`; the least recently used programs are deleted first
DETERMINISTIC = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")


def platform() -> str:
    """Returns the kind of device that JAX computes on by default: "cpu", "gpu" or "tpu".

    Only this file and `pilot_jax.kernels` call it. What depends on it elsewhere is a function of `kernels.backend`.
    """
    return jax.default_backend()


def use_compilation_cache(folder: str | None) -> None:
    """Has JAX keep its compiled programs in a folder and find them there; None: no change.

    Without a size limit JAX reads and writes the folder without a lock, so there always is one.
    """
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
    if jax.config.jax_compilation_cache_max_size == -1:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_max_size", PROGRAMS_KEPT)


def has_started() -> bool:
    """Whether JAX has looked for devices, after which it reads no more flags."""
    name, value = "jax_num_cpu_devices", jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    try:
        # JAX refuses this update once it has started. No public function says so.
        jax.config.update(name, value + 1 if value > 0 else 1)
    except RuntimeError:
        return True
    jax.config.update(name, value)
    return False


def ask_for_determinism(system: SystemConfig) -> None:
    """Has XLA choose the same algorithms in every run, if `system.deterministic`; CPU and TPU do so by themselves.

    Raises:
        InputError: JAX has started on a GPU without these flags.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    missing = [flag for flag in DETERMINISTIC if flag not in flags]
    if not system.deterministic or not missing:
        return
    if not has_started():
        os.environ["XLA_FLAGS"] = " ".join([flags, *missing]).strip()
    elif platform() == "gpu":
        raise InputError(f"system.deterministic: JAX has started without it. Set XLA_FLAGS=\"{' '.join(missing)}\" "
                         "before Python starts.")


def split_cpu(system: SystemConfig, processes: int = 1) -> None:
    """Has JAX see the CPU as the devices that `mesh` or `client_devices` need, by default as one device per core.

    A mesh is divided among the `processes`. Nothing happens once JAX has started.

    On two cores, two devices with a client each train about a third more than one device with both: what XLA does not
    spread over threads runs side by side all the same.
    """
    count = -(-system.mesh.devices // processes) if system.mesh.devices > 1 else system.client_devices
    # JAX refuses the update once it has started, and where XLA_FLAGS set the number already.
    with contextlib.suppress(RuntimeError, ValueError):
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            # macOS and Windows have no affinity; there every core counts.
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            jax.config.update("jax_num_cpu_devices", count or cores)


def client_devices(wanted: int | None, base: Mapping[str, PyTree]) -> int:
    """Returns how many devices train clients side by side.

    Args:
        wanted: `system.client_devices`. None: on CPU all devices, if a base of less than 500 MB is copied to each;
            elsewhere one.

    Raises:
        InputError: more are wanted than there are.
    """
    available = jax.device_count()
    if wanted is not None:
        if wanted > available:
            raise InputError(f"system.client_devices: {wanted} asked for, {available} there. Lower it; on CPU, `run` "
                             "makes as many as there are cores before JAX starts.")
        return wanted
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(base)) < 500e6
    return available if platform() == "cpu" and small else 1
