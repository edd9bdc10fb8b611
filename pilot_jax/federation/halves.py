"""Split-half measure: how far clients are apart, relative to how little their own data say.

Each step's batch has one half from each of two halves of a client's data, and the mean gradients a_k and b_k of the two
are kept apart, with entries as signed square roots. Their noise is independent, so that, with u_k = (a_k + b_k)/2,

    δ²_kj = ⟨a_k − a_j, b_k − b_j⟩   estimates, without bias, the squared distance of the gradients behind the noise,
    σ²_k  = ‖a_k − b_k‖² / 4          that of u_k from the gradient behind its noise.

Where δ²_kj is above σ²_k, client k learns more from its own samples alone than from client j's upload; for two clients
the minimiser of the squared error takes σ²/(2σ² + δ²) from the other (Grimberg et al., 2021, arXiv 2110.12946).

Clients upload sketches of a and b: sums of entries with random signs, of which inner products are unbiased estimates of
those of the gradients (Charikar et al., 2002, with bins that repeat along the vector instead of random ones).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

from pilot_jax.federation.phases import LocalRule
from pilot_jax.federation.roles import Mode, Role, Tree
from pilot_jax.kernels.pairwise import exact_einsum
from pilot_jax.parallel.processes import to_host
from pilot_jax.programs import KeptJit

SKETCH = "gradient_sketch"  # the subtree with which sketches are uploaded
SKETCH_SIZE = 8192  # d; an inner product is off by about ‖x‖‖y‖/√d


def sketch(tree: Tree, size: int = SKETCH_SIZE) -> Float[Array, "n d"]:
    """Returns sketches of the n rows of a tree with leaves [n, …], the same linear map for all clients and rounds.

    It has the tree's own entries if there are at most `size`.
    """
    flat = jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)], axis=1)
    if flat.shape[1] <= size:
        return jnp.pad(flat, ((0, 0), (0, size - flat.shape[1])))
    signs = jax.random.rademacher(jax.random.key(0), (flat.shape[1],), jnp.float32)
    padded = jnp.pad(flat * signs, ((0, 0), (0, -flat.shape[1] % size)))
    return jnp.sum(padded.reshape(len(padded), -1, size), axis=1)


@dataclasses.dataclass(frozen=True)
class SplitHalves(LocalRule):
    """Leaves the steps as they are, and keeps sketches of the mean gradient of `subtrees` on each half of the data."""

    averages_gradients: bool = True
    halves: bool = True
    subtrees: tuple[str, ...] = ("text_adapter",)

    def summand(self, gradient):
        """Returns the subtrees' entries as signed square roots, so that not a few large ones decide how far clients
        are apart."""
        measured = {name: gradient[name] for name in self.subtrees}
        return jax.tree.map(lambda leaf: jnp.sign(leaf) * jnp.sqrt(jnp.abs(leaf)), measured)

    def carry(self, mean_gradient, carried):
        return {**carried, SKETCH: {name: sketch(mean_gradient[name]) for name in self.subtrees}}


def sketch_role(stages: tuple[str, ...]) -> Role:
    """Returns the sketch's row of the ownership table."""
    modes: dict[str, Mode] = dict.fromkeys(stages, "carried")
    return Role(SKETCH, modes, "shared", "never")


def empty_sketch(subtrees: tuple[str, ...]) -> Tree:
    """Returns the sketches before the first phase."""
    return {name: jnp.zeros((2, SKETCH_SIZE)) for name in subtrees}


@KeptJit
def measure(sketches: Float[Array, "S 2 d"]) -> tuple[Float[Array, "S S"], Float[Array, " S"]]:
    """Returns δ²_kj and σ²_k of a cohort, as the module's text defines them. δ² may be negative, as an estimate."""
    a, b = sketches[:, 0], sketches[:, 1]
    inner = exact_einsum("sd,td->st", a, b)
    own = jnp.diag(inner)
    return own[:, None] + own[None] - inner - inner.T, jnp.sum((a - b) ** 2, axis=1) / 4


class Evidence(TypedDict):
    """What the server knows of K clients: sums over phases, by pair of clients, and the first sketches of each."""

    apart: Float[np.ndarray, "K K"]  # sums of δ²_kj
    noise: Float[np.ndarray, "K K"]  # sums of σ²_k, of the same phases
    first: dict[int, Float[np.ndarray, "2 d"] | None]  # of a client's first phase; None as soon as nobody can be new


def no_evidence(clients: int) -> Evidence:
    """Returns the server's evidence before the first phase."""
    return {"apart": np.zeros((clients, clients), np.float32), "noise": np.zeros((clients, clients), np.float32),
            "first": {}}


def with_phase(evidence: Evidence, sketches: Float[Array, "S 2 d"], ids: Int[np.ndarray, " S"],
               new: Bool[np.ndarray, " S"]) -> tuple[Evidence, Float[np.ndarray, "S S"]]:
    """Returns the evidence with that of a phase, and the cohort's ratios δ²_kj/σ²_k of all its phases, [S, S].

    Row k of a ratio is about what client k can take from j. It is 0 where no noise was measured on either side.
    Gradients tell two clients apart only where both began from about the same model. So a new client is compared with
    every earlier one by the first phases of the two, and by no other phase of the round in which it is new. In that
    round others take nothing from it (∞), unless all are new.
    """
    apart, noise = to_host(measure(sketches))
    alike, at = new[:, None] == new[None], np.ix_(ids, ids)
    out: Evidence = {**no_evidence(0), **evidence}  # `first` is newer than some snapshots
    out["apart"], out["noise"] = out["apart"].copy(), out["noise"].copy()
    out["apart"][at] += np.where(alike, apart, 0)
    out["noise"][at] += np.where(alike, noise[:, None], 0)
    rows = to_host(sketches)
    arrived = {int(c): rows[k] for k, c in enumerate(ids) if new[k] and int(c) not in out["first"]}
    _compare_first_phases(out, arrived)
    out["first"] = out["first"] | arrived
    if len(out["first"]) == len(out["apart"]):
        out["first"] = dict.fromkeys(out["first"])
    above, below = out["apart"][at], out["noise"][at]
    ratio = np.where(below > 0, above / np.where(below > 0, below, 1), np.where(above > 0, np.inf, 0))
    ratio[:, new & ~np.all(new)] = np.inf
    return out, ratio.astype(np.float32)


def _compare_first_phases(evidence: Evidence, arrived: Mapping[int, Float[np.ndarray, "2 d"]]) -> None:
    """Adds the first phases of clients that have `arrived`, each beside that of every earlier one."""
    earlier = {c: sketches for c, sketches in evidence["first"].items() if sketches is not None}
    if not arrived or not earlier:
        return
    apart, noise = to_host(measure(np.stack([*arrived.values(), *earlier.values()])))
    clients = np.asarray([*arrived, *earlier])
    late = np.arange(len(clients)) < len(arrived)
    one_is_late, at = late[:, None] != late[None], np.ix_(clients, clients)
    evidence["apart"][at] += np.where(one_is_late, apart, 0)
    evidence["noise"][at] += np.where(one_is_late, noise[:, None], 0)


def shares(ratio: Real[np.ndarray, "S S"], sizes: Real[np.ndarray, " S"], limit: float) -> Float[np.ndarray, "S S"]:
    """Returns weights w_kj ∝ n_j·max(0, 1 − ratio_kj/limit), and ∝ n_k for the client itself; rows sum to 1."""
    kept = np.clip(1 - ratio / limit, 0, 1)
    np.fill_diagonal(kept, 1)
    raw = kept * np.asarray(sizes, np.float64)
    return (raw / raw.sum(axis=1, keepdims=True)).astype(np.float32)
