"""Pilot (Xiong et al., "Pilot: Building the Federated Multimodal Instruction Tuning Framework", AAAI 2025,
arXiv 2501.13985): task and client visual adapters, a cross-task mixture of adapters, ATA over LoRA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pilot_jax.federation import mixing
from pilot_jax.federation.roles import BASE_ROWS, Role, Roles, num_bytes
from pilot_jax.federation.strategies.base import Aggregated, Strategy, float32
from pilot_jax.models.lora import init_lora


def _zero_last(adapter):
    """The MLP with a zero last layer: it adds nothing yet, and its first layer lets the last one learn."""
    return {"linear_1": adapter["linear_1"], "linear_2": jax.tree.map(jnp.zeros_like, adapter["linear_2"])}


def _repeat(tree, times: int):
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (times, *leaf.shape)), tree)


class Pilot(Strategy):
    first_stages = ("stage1", "stage2")
    later_stages = ("stage2",)

    def roles(self):
        return Roles((
            *BASE_ROWS,
            Role("text_adapter", {"stage1": "trained", "stage2": "trained"}, "shared", "ata"),
            Role("task", {"stage1": "trained", "stage2": "trained"}, "shared", "per_task_mean"),
            Role("client", {"stage1": "trained", "stage2": "frozen"}, "local", "never"),
            Role("task_bank", {"stage1": "-", "stage2": "frozen"}, "received", "never"),
            Role("cross_task", {"stage1": "-", "stage2": "trained"}, "local", "never"),
            Role("router", {"stage1": "-", "stage2": "trained"}, "local", "never"),
        ))

    def initial_adapters(self, key, projector, model, rank, num_tasks):
        """preserve: ψ_t is the projector, ψ_s and ψ_c add zero, so step 0 computes the base model. copy: the
        authors' code, every MLP a copy of the projector (ψ_t and ψ_s then stay equal under L_d)."""
        projector = float32(projector)
        extra = projector if self.config.init == "copy" else _zero_last(projector)
        router = 0.02 * jax.random.normal(jax.random.fold_in(key, 1000), (model.vision.feature_size, num_tasks))
        return {
            "text_adapter": init_lora(key, model.text, rank),
            "task": projector,
            "client": extra,
            "task_bank": _repeat(projector, num_tasks),
            "cross_task": _repeat(extra, num_tasks),
            "router": {"kernel": router},
        }

    def initial_server_state(self, adapters):
        return {"bank": adapters["task_bank"], "members": {}}

    def stages(self, first_time, round_):
        return self.first_stages if first_time or self.schedule == "every_round" else self.later_stages

    def fetch(self, adapters, server_state, task):
        """The current bank, and ψ_t from its own slot. LoRA is the client's last (a newcomer's: the initial one)."""
        return {**adapters, "task": jax.tree.map(lambda leaf: leaf[task], server_state["bank"]),
                "task_bank": server_state["bank"]}

    def aggregate(self, uploads, sizes, tasks, client_ids, server_state):
        bank, members = self._aggregate_tasks(uploads["task"], sizes, tasks, client_ids, server_state)
        weights, distances = self._ata(uploads["text_adapter"], sizes, client_ids)
        downloads = {
            "text_adapter": mixing.apply(weights, uploads["text_adapter"]),
            "task": jax.tree.map(lambda leaf: leaf[jnp.asarray(tasks)], bank),
            "task_bank": bank,
        }
        log = {"weights": weights, "distances": distances, "effective_neighbors": mixing.effective_neighbors(weights),
               "product_gap": mixing.product_gap(weights, uploads["text_adapter"],
                                                   self.config.ata.neighbors + 1)}
        return Aggregated(downloads, {**server_state, "bank": bank, "members": members},
                          {name: np.asarray(value) for name, value in log.items()})

    def _ata(self, text_adapters, sizes, client_ids):
        c = self.config.ata
        options = {"weighting": c.weighting, "temperature": c.temperature, "include_self": c.include_self,
                   "size_weighted": c.size_weighted}
        if c.preset == "notes":  # the formula of the user's notes: w ∝ exp(−d) over the neighbours and oneself
            options = {"weighting": "softmax", "temperature": 1.0, "include_self": True, "size_weighted": False}
        return mixing.ata(text_adapters, jnp.asarray(sizes), jnp.asarray(client_ids), neighbors=c.neighbors,
                          space=c.space, **options)

    def _aggregate_tasks(self, uploads, sizes, tasks, client_ids, server_state):
        """ψ_t per task, and every client's last upload.

        A task without an upload keeps its ψ_t. Where, after round 1, all of a task's uploads come from clients in
        their first round, the last uploads of its earlier participants stay in the mean: a lone newcomer does not
        overwrite its task.
        """
        now = server_state["round"]
        members = dict(server_state["members"])
        earlier = {c: m for c, m in members.items() if m["first_round"] < now}
        for row, client in enumerate(client_ids):
            first = members.get(int(client), {"first_round": now})["first_round"]
            members[int(client)] = {"first_round": first, "task": int(tasks[row]), "size": int(sizes[row]),
                                    "adapter": jax.tree.map(lambda leaf, r=row: leaf[r], uploads)}
        rows, row_sizes, row_tasks = [uploads], list(sizes), list(tasks)
        for task in sorted(set(int(t) for t in tasks)):
            uploading = {int(c) for c, t in zip(client_ids, tasks, strict=True) if t == task}
            if not uploading & set(earlier):
                kept = [m for c, m in sorted(earlier.items()) if m["task"] == task]
                rows += [jax.tree.map(lambda leaf: leaf[None], m["adapter"]) for m in kept]
                row_sizes += [m["size"] for m in kept]
                row_tasks += [task] * len(kept)
        stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
        old = server_state["bank"]
        num_tasks = jax.tree.leaves(old)[0].shape[0]
        matrix = mixing.per_task_mean(jnp.asarray(row_sizes), jnp.asarray(row_tasks), num_tasks)
        present = np.isin(np.arange(num_tasks), tasks)

        def keep_absent(new, old):
            return jnp.where(present.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        bank = jax.tree.map(keep_absent, mixing.apply(matrix, stacked), old)
        return jax.tree.map(np.asarray, bank), members

    def sent_bytes(self, adapters):
        up = {name: num_bytes(adapters[name]) for name in ("text_adapter", "task")}
        # The own task's ψ_t comes as a slot of the bank, once.
        return up, {name: num_bytes(adapters[name]) for name in ("text_adapter", "task_bank")}
