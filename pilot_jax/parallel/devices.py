"""JAX's settings, most of which must be made before it starts, and the number of devices that train.

No other file uses XLA_FLAGS, `jax.config` or `jax.default_backend`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Mapping
from pathlib import Path

import jax
from jaxtyping import PyTree

from pilot_jax.config import SystemConfig
from pilot_jax.errors import InputError

PROGRAMS_KEPT = 16 * 2**30  # bytes of `system.compilation_cache`; the least recently used programs are deleted first
COMPILED_IN = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion", "jax_default_prng_impl",
               "jax_threefry_partitionable", "jax_numpy_rank_promotion")
# On CPU these options halve XLA's compile time and do not slow the programs (`docs/notes/performance.md`).
COMPILE_FAST: dict[str, str | bool] = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": "1"}
OVERLAPPING = "--xla_gpu_enable_latency_hiding_scheduler=true"
DETERMINISTIC = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")


def platform() -> str:
    """Returns the kind of device that JAX computes on by default: "cpu", "gpu" or "tpu".

    Only this file and `pilot_jax.kernels` call it. Other code calls the functions of `kernels.backend`.
    """
    return jax.default_backend()


def use_compilation_cache(folder: str | None) -> None:
    """Makes JAX store its compiled programs in a folder and read them from it; None: no change.

    Without a size limit JAX reads and writes the folder without a lock, so there always is one.
    """
    if folder is None:
        return
    jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
    if jax.config.jax_compilation_cache_max_size == -1:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_max_size", PROGRAMS_KEPT)


def jax_keeps_programs() -> bool:
    """Whether JAX stores compiled programs in a folder of its own."""
    return bool(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]


def options_of_programs() -> tuple[object, ...]:
    """Returns the values of JAX's options that change what a program computes."""
    return tuple(getattr(jax.config, name) for name in COMPILED_IN)


def compiler_options() -> dict[str, str | bool]:
    """Returns the options with which programs are compiled for this process's devices; empty if XLA lacks one."""
    return dict(COMPILE_FAST) if platform() == "cpu" and _knows_compile_fast() else {}


@functools.cache
def _knows_compile_fast() -> bool:
    """Whether this version of XLA has all options of `COMPILE_FAST`."""
    lowered = jax.jit(lambda: 0).lower()
    try:
        lowered.compile(compiler_options=dict(COMPILE_FAST))
    except jax.errors.JaxRuntimeError:
        return False
    return True


def flags_of_xla() -> tuple[str | None, ...]:
    """Returns the environment variables that change how XLA compiles."""
    return tuple(os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))


def has_started() -> bool:
    """Whether JAX has looked for devices, after which it reads no more flags."""
    name, value = "jax_num_cpu_devices", jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    try:
        # JAX refuses this update once it has started. No public function tells whether it has.
        jax.config.update(name, value + 1 if value > 0 else 1)
    except RuntimeError:
        return True
    jax.config.update(name, value)
    return False


def ask_for_determinism(system: SystemConfig) -> None:
    """Makes XLA choose the same algorithms in every run, if `system.deterministic`; CPU and TPU do so by themselves.

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
        raise InputError("system.deterministic: JAX has started without the XLA flags for it. "
                         f"Set XLA_FLAGS=\"{' '.join(missing)}\" before Python starts.")


def overlap_collectives(system: SystemConfig) -> None:
    """Makes XLA on GPUs send while it computes, where a mesh has several devices; on TPUs it does so by itself.

    A value that XLA_FLAGS already has stays. Nothing happens once JAX has started.
    """
    flags, name = os.environ.get("XLA_FLAGS", ""), OVERLAPPING.split("=")[0]
    if system.mesh.devices > 1 and name not in flags and not has_started():
        os.environ["XLA_FLAGS"] = f"{flags} {OVERLAPPING}".strip()


def split_cpu(system: SystemConfig, processes: int = 1) -> None:
    """Makes JAX see the CPU as the devices that `mesh` or `client_devices` need, by default as one device per core.

    A mesh is divided among the `processes`. Nothing happens once JAX has started.

    On two cores, two devices with one client each train about a third faster than one device with two clients, because
    operations that XLA does not spread over threads also run at the same time.
    """
    count = -(-system.mesh.devices // processes) if system.mesh.devices > 1 else system.client_devices
    # JAX refuses the update once it has started, or if XLA_FLAGS has set the number already.
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
        InputError: there are fewer devices than wanted.
    """
    available = jax.device_count()
    if wanted is not None:
        if wanted > available:
            raise InputError(f"system.client_devices: {wanted} devices requested, {available} available. Lower it. On "
                             "CPU, `pilot-jax run` makes one device per core before JAX starts.")
        return wanted
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(base)) < 500e6
    return available if platform() == "cpu" and small else 1
