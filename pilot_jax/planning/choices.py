"""Chooses what a config leaves to the device's memory: `model.remat`, `system.client_chunk` and `system.attention`.

The choices are those of the fastest step that fits, by the counts of compiled programs: recomputing all activations
costs about 1.4 times the operations, so it is the last resort; recomputing all but the outputs of linear layers adds
2 %; more clients at once share the products with the base.
"""

from __future__ import annotations

import dataclasses
import os

import jax

from pilot_jax.config import Config, apply_overrides
from pilot_jax.config.model import Remat
from pilot_jax.errors import InputError
from pilot_jax.kernels.attention import cudnn_obstacle
from pilot_jax.planning.estimate import Workload, activations, memory, phase_shapes, read_workload
from pilot_jax.runs.outline import Outline
from pilot_jax.runs.prepare import outline

MOST_AT_ONCE = 16  # clients that `client_chunk: auto` trains at once
WORDS: dict[Remat, str] = {False: "stores activations", True: "recomputes activations",
                          "selective": "stores the linear layers' outputs and recomputes the rest"}
SPARE = 0.08  # share of a device's memory left to XLA's own buffers and to fragmentation


@dataclasses.dataclass(frozen=True)
class Device:
    """A device of which a run uses one or several."""

    platform: str  # cpu, gpu or tpu
    bytes: float


DEVICES = {f"{size}gb": Device("gpu", size * 1e9) for size in (16, 24, 80, 141)} | {
    "v5e": Device("tpu", 16e9), "v6e": Device("tpu", 32e9)}


def this_device() -> Device:
    """Returns the first of this machine's devices; of a CPU, with the machine's memory."""
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return Device(device.platform, limit or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def chosen(config: Config, device: Device, **assumptions: int) -> tuple[Config, str]:
    """Returns the config with every choice made, and one line that says which and why.

    Args:
        assumptions: arguments of `estimate.read_workload`.

    Raises:
        InputError: the run does not fit the device.
    """
    run = outline(config)
    attention, because = _attention(run, device)
    run = dataclasses.replace(run, system=run.system.model_copy(update={"attention": attention}))
    work, room = read_workload(config, run, **assumptions), (1 - SPARE) * device.bytes
    remats: list[Remat] = [False, "selective", True] if run.model.remat == "auto" else [run.model.recomputes]
    chunk = run.system.client_chunk
    least = 1 if chunk == "auto" else chunk
    needs: dict[Remat, list[float]] = {}
    for remat in remats:
        most = _clients_at_most(run, work) if chunk == "auto" else chunk
        needs[remat] = _bytes(run, work, remat, most)
        if needs[remat][least - 1] <= room:
            break
    else:
        raise InputError(_too_large(needs[remat][least - 1], device, remat, least))
    width = least if chunk != "auto" else max(n for n, size in enumerate(needs[remat], 1) if size <= room)
    told = [WORDS[remat]
            + (f" (storing them needs {needs[False][least - 1] / 1e9:.1f} GB)" if remat and False in needs else ""),
            f"{width} client{'s' * (width > 1)} at once"
            + (f" ({width + 1} need {needs[remat][width] / 1e9:.1f} GB)" if width < len(needs[remat]) else ""),
            f"attention {attention} ({because})"]
    line = (f"a device of {device.bytes / 1e9:.1f} GB: {', '.join(told)}; by plan "
            f"{needs[remat][width - 1] / 1e9:.1f} GB of {room / 1e9:.1f} GB that a run may use")
    return apply_overrides(config, [f"system.client_chunk={width}", f"system.attention={attention}",
                                    f"model.remat={str(remat).lower()}"]), line


def _attention(run: Outline, device: Device) -> tuple[str, str]:
    """Returns the implementation of attention, and why."""
    if run.system.attention != "auto":
        return run.system.attention, "as configured"
    if run.system.mesh.fsdp * run.system.mesh.tensor > 1:
        return "own", "cudnn needs a base that is whole on each device"
    text, dtype = run.spec.text, run.model.dtype
    if dtype == "auto":
        dtype = "float32" if device.platform == "cpu" else "bfloat16"
    obstacle = cudnn_obstacle(device.platform, text.head_dim, text.layers_see_alike, dtype)
    return ("cudnn", "a GPU and bfloat16") if obstacle is None else ("own", f"cudnn {obstacle.split('.')[0]}")


def _clients_at_most(run: Outline, work: Workload) -> int:
    rows = run.system.mesh.clients
    return min(MOST_AT_ONCE, -(-len(work.sizes) // rows))


def _bytes(run: Outline, work: Workload, remat: Remat, most: int) -> list[float]:
    """Returns the bytes on a device with 1, 2, … `most` clients at once, of the phase that needs most."""
    run = dataclasses.replace(run, model=run.model.model_copy(update={"remat": remat}))
    shapes = phase_shapes(run, work)
    stored = activations(shapes)
    return [float(max(kinds["total"] for kinds in memory(dataclasses.replace(shapes, run=dataclasses.replace(
        run, system=run.system.model_copy(update={"client_chunk": count}))), stored).values()))
        for count in range(1, most + 1)]


def _too_large(needed: float, device: Device, remat: Remat, clients: int) -> str:
    ways = [*(["model.remat=true"] if remat is not True else []), *(["system.client_chunk=1"] if clients > 1 else []),
            "train.microbatch=1", "model.base=nf4", "a mesh with a larger system.mesh.fsdp"]
    return (f"system: by plan the run needs {needed / 1e9:.1f} GB on each device, and a device of "
            f"{device.bytes / 1e9:.1f} GB leaves {(1 - SPARE) * device.bytes / 1e9:.1f} GB. Try {', '.join(ways)}. "
            "Nothing was loaded.")
