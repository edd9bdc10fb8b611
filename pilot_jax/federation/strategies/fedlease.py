"""FedLEASE (Wang, Bian, Zhang and Xu, NeurIPS 2025, arXiv 2509.15087): shared experts by clusters of clients.

1. *Warm-up.* Every client trains its LoRA alone for one phase.
2. *Allocation.* The server clusters the clients once, by the distance

       d_ij = mean over targets and layers of 1 − cos(B_i, B_j)

   with agglomerative clustering (average linkage). The number of clusters, from 2 to `max_experts`, is the one with the
   largest mean silhouette. Each cluster has one expert, the mean of its members' LoRA, and one router, likewise.
3. *Selection.* From then on a client has its cluster's expert, which it trains with the router, and the other experts,
   frozen. A router has 2M − 1 outputs for M experts: one for each expert, and M − 1 more for the client's own. The M
   largest of a token count (`models.experts.gates`), so that the own expert always takes part, and up to M − 1 others.
   After every phase the server takes the means over the clusters again, and each client downloads all experts.

Read for this file: the abstract, excerpts of reviews, and the authors' code (github.com/lei-wang-link/FedLEASE:
`main.py`, `utils.py`, `server.py`, `client.py`, `peft/tuners/lora.py`). Its clusters, gates and means, which are not
weighted by data size, are those of this file. Its server computes the means at the end of the warm-up, but its clients
load them a phase later; here all members begin from the mean at once. Inferred, since all clients take part in every
round there: a cohort of one or two clients, which has no silhouette, makes as many clusters; a client whose first phase
is later warms up in it, then joins the cluster whose expert's B is nearest, and counts in its mean from its next phase
on; an expert without an upload stays as it is; the projector, which is no LoRA, is averaged as in `fedavg`.

Arrays have room for `max_experts` experts, and counts of bytes are those of whole arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from pydantic import Field

from pilot_jax.config import StrategyParams
from pilot_jax.federation import mixing
from pilot_jax.federation.cohort import Aggregated
from pilot_jax.federation.roles import BASE_ROWS, Role, Roles, Tree, num_bytes
from pilot_jax.federation.strategies.base import Strategy, register
from pilot_jax.models.experts import init_bank, init_router
from pilot_jax.parallel.processes import to_host


def distances_of_b(*loras: Mapping[str, Tree]) -> np.ndarray:
    """Returns the mean over targets and layers of 1 − cos(B_i, B_j), float64 [ΣS, ΣS], of LoRAs with leaves [S, …].

    Where a B is 0, its cosine with any other is taken as 0.
    """
    total, count = np.zeros(()), 0
    for name in loras[0]["layers"]:
        bs = [to_host(lora["layers"][name]["b"]) for lora in loras]  # [S, layers, d_out, R]
        for layer in range(bs[0].shape[1]):
            rows = np.concatenate([np.asarray(b[:, layer], np.float64).reshape(len(b), -1) for b in bs])
            unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
            total, count = total + 1 - unit @ unit.T, count + 1
    between = np.maximum(total + total.T, 0.0) / (2 * count)
    np.fill_diagonal(between, 0.0)
    return between


def silhouette(between: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean silhouette (Rousseeuw, 1987) of clusters: labels [S] from 0, distances [S, S].

    A client's is (b − a) / max(a, b): a its mean distance to the others of its cluster, b the least mean distance to
    another cluster; 0 for a cluster of one.
    """
    members = labels[:, None] == np.arange(labels.max() + 1)  # [S, M]
    sizes, total = members.sum(axis=0), between @ members
    own = np.arange(len(labels)), labels
    inside = total[own] / np.maximum(sizes[labels] - 1, 1)
    to_others = total / sizes
    to_others[own] = np.inf
    outside = to_others.min(axis=1)
    scores = (outside - inside) / np.maximum(np.maximum(inside, outside), 1e-30)
    return float(np.where(sizes[labels] > 1, scores, 0.0).mean())


def allocated(between: np.ndarray, most: int) -> np.ndarray:
    """Returns the cluster of each client, int [S], from distances [S, S]; at most `most` clusters.

    Clusters are numbered in the order of their first clients. Of equally good numbers of clusters, the smallest wins.
    """
    from scipy.cluster.hierarchy import cut_tree, linkage  # takes a third of a second
    from scipy.spatial.distance import squareform

    if len(between) <= 2:
        return np.arange(len(between))
    tree = linkage(squareform(between, checks=False), "average")
    options = [cut_tree(tree, count)[:, 0] for count in range(2, min(most, len(between) - 1) + 1)]
    best = max(options, key=lambda labels: silhouette(between, labels))
    first = np.sort(np.unique(best, return_index=True)[1])
    return np.argmax(best[:, None] == best[first], axis=1)


def slot_table(most: int, count: int = 0, cluster: int | None = None) -> np.ndarray:
    """Returns which row of a client's router belongs to which expert, float32 [2·most − 1, 1 + most].

    Column 0 is the client's own expert, column 1 + e the bank's expert e. Row e < most is expert e's, the others are
    the own expert's. With `count` experts, those from `count` on and as many of the other rows are out of use, and the
    row of the client's `cluster` is its own expert's. Without a cluster, in the warm-up, there is the own expert alone.
    """
    table = np.zeros((2 * most - 1, 1 + most), np.float32)
    if cluster is None:
        table[most, 0] = 1
        return table
    for expert in range(count):
        table[expert, 0 if expert == cluster else 1 + expert] = 1
    table[most:most + count - 1, 0] = 1
    return table


def cluster_of(table: np.ndarray) -> int | None:
    """Returns the cluster from a client's `slot_table`; None before it has one."""
    rows = np.flatnonzero(np.asarray(table)[:table.shape[1] - 1, 0])
    return int(rows[0]) if len(rows) else None


@register("fedlease")
class FedLease(Strategy):
    """FedLEASE; the module's text describes it. `expert_bank` has all experts, `text_adapter` the one to be trained."""

    class Params(StrategyParams):
        max_experts: int = Field(4, ge=2, le=64, description="Number of experts that fedlease makes at most, one for "
                                 "each cluster of clients. Memory and downloads are those of so many experts.")

    needs_one_rank = True

    def has_common_model(self):
        return False  # each cluster has its own

    def roles(self):
        return Roles((*BASE_ROWS,
                      Role("text_adapter", {"plain": "trained"}, "shared", "cluster_mean"),
                      Role("expert_bank", {"plain": "frozen"}, "received", "never"),
                      Role("expert_router", {"plain": "trained"}, "shared", "cluster_mean"),
                      Role("expert_slots", {"plain": "frozen"}, "local", "never"),
                      self.projector_role("shared", "mean")))

    def beside_lora(self, key, lora):
        most = self.params.max_experts
        return {"expert_bank": init_bank(lora, most),
                "expert_router": init_router(jax.random.fold_in(key, 3000), lora, 2 * most - 1),
                "expert_slots": {"table": slot_table(most)}}

    def initial_server_state(self, adapters, sizes, tasks):
        most = self.params.max_experts
        routers = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[None], most, axis=0), adapters["expert_router"])
        projector = {n: t for n, t in adapters.items() if n == "projector"}
        return super().initial_server_state(projector, sizes, tasks) | {
            "bank": adapters["expert_bank"], "routers": routers, "clusters": {}}

    def fetch(self, adapters, server, task):
        """Returns the adapters with all experts and, once the client has a cluster, its expert and its router."""
        now = {**super().fetch(adapters, server, task), "expert_bank": server["bank"]}
        cluster = cluster_of(adapters["expert_slots"]["table"])
        if cluster is None:
            return now
        return now | {"text_adapter": jax.tree.map(lambda leaf: leaf[:, cluster], server["bank"]),
                      "expert_router": jax.tree.map(lambda leaf: leaf[cluster], server["routers"])}

    def parts_of(self, downloads, task):
        cluster = cluster_of(downloads["expert_slots"]["table"])
        return {} if cluster is None else {
            "text_adapter": jax.tree.map(lambda leaf: leaf[:, cluster], downloads["expert_bank"])}

    def aggregate(self, cohort, server):
        uploads = dict(cohort.uploads)
        lora = {n: uploads.pop(n) for n in ("text_adapter", "expert_router")}
        downloads, state, _ = super().aggregate(dataclasses.replace(cohort, uploads=uploads), server)
        labels, counts, log = self._clusters(cohort, server)
        most = self.params.max_experts
        members = (labels == np.arange(most)[:, None]) & counts  # [experts, S]
        matrix = (members / np.maximum(members.sum(axis=1, keepdims=True), 1)).astype(np.float32)
        means = to_host(mixing.apply(matrix, lora))
        present = members.any(axis=1)

        def kept(new, old, axis):
            return np.where(present.reshape(*(1,) * axis, -1, *(1,) * (np.ndim(old) - 1 - axis)), new, old)

        state["bank"] = jax.tree.map(lambda mean, old: kept(np.moveaxis(mean, 0, 1), old, 1), means["text_adapter"],
                                     state["bank"])
        state["routers"] = jax.tree.map(lambda mean, old: kept(mean, old, 0), means["expert_router"], state["routers"])
        state["clusters"] = server["clusters"] | {int(c): int(e) for c, e in zip(cohort.ids, labels, strict=True)}
        count = 1 + max(state["clusters"].values())
        tables = np.stack([slot_table(most, count, int(cluster)) for cluster in labels])
        # `fetch` gives a client its expert and its router, by its table.
        downloads |= {"expert_bank": state["bank"], "expert_slots": {"table": tables}}
        return Aggregated(downloads, state, {"weights": matrix[labels]} | log)

    def _clusters(self, cohort, server):
        """Returns the cluster of each client, whether its upload counts in the cluster's mean, and arrays to log."""
        known, lora = server["clusters"], cohort.uploads["text_adapter"]
        if not known:
            between = distances_of_b(lora)
            return allocated(between, self.params.max_experts), np.ones(len(cohort), bool), {"distances": between}
        member = np.asarray([int(client) in known for client in cohort.ids])
        labels = np.asarray([known.get(int(client), -1) for client in cohort.ids])
        if not member.all():
            count = 1 + max(known.values())
            experts = jax.tree.map(lambda leaf: np.moveaxis(leaf, 1, 0)[:count], server["bank"])
            to_experts = distances_of_b(lora, experts)[:len(cohort), len(cohort):]
            labels = np.where(member, labels, np.argmin(to_experts, axis=1))
        return labels, member, {}

    def sent_bytes(self, adapters):
        up, down = super().sent_bytes(adapters)
        del down["text_adapter"]
        return up, {**down, **{name: num_bytes(adapters[name]) for name in ("expert_bank", "expert_slots")}}
