"""Uploads between client and server: how they leave a client, and which of them the server refuses and why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from pilot_jax.config import FederationConfig
from pilot_jax.federation.privacy import Noise, SystemNoise, noised
from pilot_jax.federation.randomness import client_generator
from pilot_jax.federation.roles import Tree
from pilot_jax.federation.state import Federation


def after_upload(fed: Federation, client: int, round_: int, stage: str, label: str, before: Mapping[str, Tree],
                 after: dict[str, Tree]) -> tuple[dict[str, Tree], dict[str, Any]]:
    """Returns a client's adapters after its upload, and the record of the upload.

    Args:
        stage, label: of its phase.
        before, after: its adapters at the start and at the end of its training.

    Returns: `after` with the subtrees as they were uploaded (clipped and noised where `settings.privacy` asks), and
        {"update_norm": L2 norm of the uploaded subtrees' change} or {"fault": why the server cannot use it}.
    """
    roles = fed.strategy.ownership()
    start, upload = roles.upload(before, stage), roles.upload(after, stage)
    fault, privacy = not_finite(roles.select(after, "local")), fed.settings.privacy
    name = fed.clients[client].name
    if privacy.clip is not None and upload:
        rng: Noise = SystemNoise()
        if privacy.seed is not None and not fed.secret_noise:
            rng = client_generator(privacy.seed, name, round_, f"{label} noise")
        upload = noised(upload, start, privacy.clip, 2 * fed.noise_multiplier * privacy.clip, rng)
    if fed.tamper is not None:
        upload = fed.tamper(name, round_, upload, start)
    return {**after, **upload}, judged(upload, start, fault)


def judged(upload: Mapping[str, Tree], start: Mapping[str, Tree], fault: str | None = None) -> dict[str, Any]:
    """Returns {"update_norm": L2 norm of an upload's change} or {"fault": why the server cannot use it}.

    start: the same subtrees before the phase. fault: of the client's other adapters, if there is one.
    """
    fault, norm = misfit(upload, start) or fault, 0.0
    if not fault:
        norm = change(upload, start)
        fault = None if np.isfinite(norm) else not_finite(upload) or "has a norm beyond float32"
    return {"fault": fault} if fault else {"update_norm": norm}


def misfit(upload: Any, expected: Any) -> str | None:
    """Returns what is wrong with the structure, shapes or dtypes of an upload, or None."""
    if jax.tree.structure(upload) != jax.tree.structure(expected):  # type: ignore[operator]
        return "has other subtrees than expected"
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(upload), jax.tree.leaves(expected), strict=True):
        got, want = np.asarray(got), np.asarray(want)
        if got.shape != want.shape or got.dtype != want.dtype:
            return (f"has {got.dtype} {list(got.shape)} in {jax.tree_util.keystr(path)}, expected {want.dtype} "
                    f"{list(want.shape)}")
    return None


def not_finite(adapters: Any) -> str | None:
    """Returns where adapters are not finite, or None. Local ones count too: they would spoil the next phase."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        if not np.isfinite(leaf).all():
            return f"is not finite in {jax.tree_util.keystr(path)}"
    return None


def change(upload: Any, start: Any) -> float:
    """Returns ‖upload − start‖₂ over all leaves."""
    total = 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        for a, b in zip(jax.tree.leaves(upload), jax.tree.leaves(start), strict=True):
            apart = np.subtract(a, b, dtype=np.float32).ravel()
            total += float(np.dot(apart, apart))
    return math.sqrt(total) if total >= 0 else math.nan


REMEMBERED = 64  # accepted norms that the state stores for each stage


def refusals(federation: FederationConfig, records: Mapping[int, Mapping[str, Any]],
             earlier: Sequence[float] = ()) -> dict[int, str]:
    """Returns the clients whose upload the server refuses, and why; records: of each client, from `after_upload`.

    An update is refused if its norm is more than `max_update_ratio` times the median norm. The median is over this
    phase and `earlier`, the norms last accepted in this stage, because all clients of a phase may be new and bad. Of an
    even number of norms, the median is the lower of the middle two, so that one of two clients can be refused.
    """
    out = {client: r["fault"] for client, r in records.items() if "fault" in r}
    norms = sorted([*earlier, *(r["update_norm"] for r in records.values() if "fault" not in r)])
    if federation.max_update_ratio is not None and norms:
        most = federation.max_update_ratio * norms[(len(norms) - 1) // 2]
        for client, r in records.items():
            if client not in out and r["update_norm"] > most > 0:
                out[client] = (f"has a norm of {r['update_norm']:.3g}, above federation.max_update_ratio "
                               f"({federation.max_update_ratio:g}) times the median")
    return out
