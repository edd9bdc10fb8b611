"""Bounds on what one client can do to the others: rules that scale the weights of other clients' uploads down.

A mixture that client k receives is x_k + Σ_{j≠k} w_kj·(x_j − x_k), with x the uploaded models, or their changes. The
rules below make w_kj smaller, and what they take away goes to w_kk, so that rows still sum to 1:

    credit    w_kj·α_j        α_j is near 0 for clients whose changes are near-duplicates: FoolsGold (Fung, Yoon and
                              Beschastnikh, RAID 2020, "The limitations of federated learning in sybil settings",
                              arXiv 1808.04866)
    clipping  w_kj·min(1, C/‖x_j − x_k‖), which is x_k + Σ_j w_kj·clip(x_j − x_k, C): ClippedGossip (He, Karimireddy and
                              Jaggi, 2022, arXiv 2202.01545)
    caps      w_kj ≤ c_one (weights are truncated: Portnoy, Tirosh and Hendler, 2020, arXiv 2004.04986), and
                              Σ_{j≠k} w_kj ≤ c_all (a fixed share for the own model, as in BALANCE: Fang et al., CCS
                              2024, arXiv 2406.10416)

So all other clients together move client k by at most c_all·C, whatever they upload and however they collude. The
radius C is a multiple of the median norm of the cohort's changes, which is FLAME's rule (Nguyen et al., USENIX Security
2022, arXiv 2101.02281). A common model v is protected by clipping the changes themselves, v + Σ_j w_j·clip(x_j − v, C):
norm clipping (Sun et al., 2019, "Can you really backdoor federated learning?", arXiv 1911.07963), or one step of
centred clipping (Karimireddy, He and Jaggi, ICML 2021, arXiv 2012.10333) without its momentum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Real

from pilot_jax.federation.cohort import Cohort
from pilot_jax.federation.distances import cosines, distances
from pilot_jax.federation.halves import sketch
from pilot_jax.kernels.pairwise import exact_einsum
from pilot_jax.parallel.processes import to_host
from pilot_jax.programs import KeptJit

AnyArray = Array | np.ndarray
Applied = tuple[np.ndarray, dict[str, Any], dict[str, np.ndarray]]
Histories = Mapping[int, np.ndarray]  # by client id: the sketch [d] of the sum of its changes


@KeptJit
def norms(changes: PyTree[Float[AnyArray, "S ..."]]) -> Float[Array, " S"]:
    """Returns the L2 norm of each client's tree, over all leaves."""
    flat = [leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(changes)]
    return jnp.sqrt(jnp.sum(jnp.stack([exact_einsum("si,si->s", leaf, leaf) for leaf in flat]), axis=0))


def radius(lengths: Real[AnyArray, " S"], factor: float) -> float:
    """Returns C, `factor` times the median; of an even number of lengths, the lower of the middle two."""
    return factor * float(np.sort(np.asarray(lengths))[(len(lengths) - 1) // 2])


def clip_scales(lengths: Real[AnyArray, "*shape"], limit: float) -> Float[np.ndarray, "*shape"]:
    """Returns min(1, limit/length) for each length; 1 where it is 0."""
    lengths = np.asarray(lengths, np.float32)
    return np.where(lengths > limit, limit / np.where(lengths > 0, lengths, 1), 1).astype(np.float32)


def clipped(uploads: PyTree[Float[AnyArray, "S ..."]], starts: PyTree[Float[AnyArray, "S ..."]],
            scales: Float[AnyArray, " S"]) -> PyTree[Float[Array, "S ..."]]:
    """Returns starts + scales·(uploads − starts), client by client; uploads of scale 1 stay as they are, bitwise."""
    def one(upload: Any, start: Any) -> Any:
        scale = jnp.asarray(scales).reshape(-1, *(1,) * (upload.ndim - 1))
        return jnp.where(scale < 1, start + scale * (upload - start), upload).astype(upload.dtype)

    return jax.tree.map(one, uploads, starts)


def clip_changes(uploads: Mapping[str, Any], starts: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Returns uploads whose changes are clipped, each subtree by itself, at `factor` times its median norm."""
    out = {}
    for name, upload in uploads.items():
        lengths = to_host(norms(jax.tree.map(jnp.subtract, upload, starts[name])))
        out[name] = clipped(upload, starts[name], clip_scales(lengths, radius(lengths, factor)))
    return out


def scaled_down(weights: Float[AnyArray, "S S"], scales: Float[AnyArray, "#S S"]) -> Float[np.ndarray, "S S"]:
    """Returns `weights` with those of others times `scales` ≤ 1, and what that takes away given to the diagonal."""
    kept = np.asarray(weights, np.float32) * np.where(np.eye(len(weights), dtype=bool), 1, scales).astype(np.float32)
    return kept + np.diag(np.sum(weights - kept, axis=1)).astype(np.float32)


def capped(weights: Float[AnyArray, "S S"], one: float | None, together: float | None) -> Float[np.ndarray, "S S"]:
    """Returns `weights` with each other client's at most `one`, and then, in proportion, their sum at most `together`.
    """
    weights, own = np.asarray(weights, np.float32), np.eye(len(weights), dtype=bool)
    if one is not None:
        weights = scaled_down(weights, clip_scales(weights, one))
    if together is not None:
        others = np.sum(np.where(own, 0, weights), axis=1, keepdims=True)
        weights = scaled_down(weights, np.broadcast_to(clip_scales(others, together), weights.shape))
    return weights


def with_changes(histories: Histories, changes: PyTree[Float[AnyArray, "S ..."]], ids: Real[AnyArray, " S"],
                 ) -> dict[int, np.ndarray]:
    """Returns `histories` with the cohort's changes added to those of its clients.

    A sketch has the tree's own entries if there are at most `halves.SKETCH_SIZE` of them.
    """
    rows = to_host(_sketches(changes))
    return {**histories, **{int(c): histories.get(int(c), 0) + row for c, row in zip(ids, rows, strict=True)}}


@KeptJit
def _sketches(changes: PyTree[Float[AnyArray, "S ..."]]) -> Float[Array, "S d"]:
    return jax.lax.map(lambda one: sketch(jax.tree.map(lambda leaf: leaf[None], one))[0], changes)


def credit(histories: Float[AnyArray, "S d"]) -> Float[np.ndarray, " S"]:
    """Returns FoolsGold's α_j in [0, 1] of a cohort, from the sums of each client's changes (algorithm 1, κ = 1).

    With c_ij the cosine of two histories and v_i = max(0, max_{j≠i} c_ij): c_ij is multiplied by v_i/v_j where
    v_j > v_i (pardoning), α_i = 1 − max(0, max_{j≠i} c_ij), divided by the largest α, then ln(α/(1 − α)) + ½, cut to
    [0, 1]. As in the authors' code, 0 counts among the cosines, and an α of 1 as 0.99. All α are 0 if all histories
    are alike.
    """
    between = np.asarray(cosines({"history": jnp.asarray(histories)}), np.float64)
    np.fill_diagonal(between, 0)
    most = np.max(between, axis=1)
    pardoned = between * np.minimum(1, most[:, None] / np.where(most > 0, most, 1)[None])
    alpha = np.clip(1 - np.max(np.where(most[None] > most[:, None], pardoned, between), axis=1), 0, 1)
    if np.max(alpha) <= 1e-6:
        return np.zeros(len(alpha), np.float32)
    alpha = np.minimum(alpha / np.max(alpha), 0.99)
    return np.clip(np.log(np.maximum(alpha, 1e-30) / (1 - alpha)) + 0.5, 0, 1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Defence:
    """The rules for the weights of a cohort's mixtures; None and False leave one out."""

    clip: float | None = None  # C, as a multiple of the median norm of changes
    foolsgold: bool = False
    cap_one: float | None = None
    cap_all: float | None = None

    @property
    def needs_starts(self) -> bool:
        """Whether it needs the clients' adapters from before the phase."""
        return self.clip is not None or self.foolsgold

    def applied(self, weights: Float[AnyArray, "S S"], cohort: Cohort, server: Mapping[str, Any], mixes_updates: bool,
                between: Float[AnyArray, "S S"] | None = None, name: str = "text_adapter") -> Applied:
        """Returns a mixing matrix of a subtree after all rules, what the server's state gains, and arrays to log.

        Args:
            server: its state, of which `histories` are the clients' summed changes so far.
            mixes_updates: whether changes are mixed, and not models.
            between: the distances of what is mixed, exact where weights are above 0. None: they are computed.
            name: the subtree; LoRA by default.
        """
        mixed, state, log = cohort.uploads[name], dict[str, Any](), dict[str, np.ndarray]()
        if self.needs_starts:
            assert cohort.starts is not None
            changes = jax.tree.map(jnp.subtract, mixed, cohort.starts[name])
            mixed = changes if mixes_updates else mixed
        if self.foolsgold:
            state["histories"] = with_changes(server.get("histories", {}), changes, cohort.ids)
            log["credit"] = credit(np.stack([state["histories"][int(c)] for c in cohort.ids]))
            weights = scaled_down(weights, log["credit"][None])
        if self.clip is not None:
            limit = radius(to_host(norms(changes)), self.clip)
            between = distances(mixed) if between is None else between
            weights = scaled_down(weights, clip_scales(to_host(between), limit))
        return capped(weights, self.cap_one, self.cap_all), state, log
