"""Pilot (Xiong et al., "Pilot: Building the Federated Multimodal Instruction Tuning Framework", AAAI 2025,
arXiv 2501.13985): task and client visual adapters, a cross-task mixture of adapters, ATA over LoRA."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pilot_jax.federation import mixing
from pilot_jax.federation.distances import distances
from pilot_jax.federation.roles import BASE_ROWS, Role, Roles, num_bytes
from pilot_jax.federation.strategies.base import Aggregated, Strategy, float32
from pilot_jax.models.lora import init_lora
from pilot_jax.parallel.processes import to_host


def _zero_last(adapter):
    """The MLP with a zero last layer: it adds nothing yet, and its first layer lets the last one learn."""
    return {"linear_1": adapter["linear_1"], "linear_2": jax.tree.map(jnp.zeros_like, adapter["linear_2"])}


def _repeat(tree, times: int):
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (times, *leaf.shape)), tree)


class Pilot(Strategy):
    """Ablations by `config`: `text_aggregation`, `client_adapter`, `cross_task`, `ata`; those of the losses in `train`.

    To change the method, override `distances` or `weights`.
    """

    one_model = False

    @property
    def first_stages(self):
        return ("stage1", "stage2") if self.config.cross_task else ("stage1", "stage1")

    @property
    def later_stages(self):
        return self.first_stages[1:]

    def roles(self):
        c = self.config
        rows = [*BASE_ROWS,
                Role("text_adapter", {"stage1": "trained", "stage2": "trained"}, "shared", c.text_aggregation),
                Role("task", {"stage1": "trained", "stage2": "trained"}, "shared", "per_task_mean")]
        if c.client_adapter != "none":
            kept = "frozen" if c.client_adapter == "both" else "-"
            rows.append(Role("client", {"stage1": "trained", "stage2": kept}, "local", "never"))
        if c.cross_task:
            rows += [Role("task_bank", {"stage1": "-", "stage2": "frozen"}, "received", "never"),
                     Role("cross_task", {"stage1": "-", "stage2": "trained"}, "local", "never"),
                     Role("router", {"stage1": "-", "stage2": "trained"}, "local", "never")]
        return Roles(tuple(rows))

    def initial_adapters(self, key, projector, model, rank, num_tasks):
        """preserve: ψ_t is the projector, ψ_s and ψ_c add zero, so step 0 computes the base model. copy: the
        authors' code, every MLP a copy of the projector (ψ_t and ψ_s then stay equal under L_d)."""
        projector = float32(projector)
        extra = projector if self.config.init == "copy" else _zero_last(projector)
        router = 0.02 * jax.random.normal(jax.random.fold_in(key, 1000), (model.vision.feature_size, num_tasks))
        every = {
            "text_adapter": init_lora(key, model.text, rank),
            "task": projector,
            "client": extra,
            "task_bank": _repeat(projector, num_tasks),
            "cross_task": _repeat(extra, num_tasks),
            "router": {"kernel": router},
        }
        return {row.subtree: every[row.subtree] for row in self.roles().adapter_rows}

    def initial_server_state(self, adapters, sizes, tasks):
        bank = adapters["task_bank"] if self.config.cross_task else _repeat(adapters["task"], int(np.max(tasks)) + 1)
        return {"bank": bank, "members": {}}

    def stages(self, first_time, round_):
        return self.first_stages if first_time or self.schedule == "every_round" else self.later_stages

    def fetch(self, adapters, server_state, task):
        """The current bank, and ψ_t from its own slot. LoRA is the client's last (a newcomer's: the initial one)."""
        bank = {"task_bank": server_state["bank"]} if self.config.cross_task else {}
        return {**adapters, "task": jax.tree.map(lambda leaf: leaf[task], server_state["bank"]), **bank}

    def aggregate(self, uploads, sizes, tasks, client_ids, server_state):
        bank, members = self._aggregate_tasks(uploads["task"], sizes, tasks, client_ids, server_state)
        between = self.distances(uploads["text_adapter"])
        weights = to_host(self.weights(between, sizes, tasks, client_ids))
        downloads = {
            "text_adapter": mixing.apply(weights, uploads["text_adapter"]),
            "task": jax.tree.map(lambda leaf: leaf[tasks], bank),
        } | ({"task_bank": bank} if self.config.cross_task else {})
        log = {"weights": weights, "distances": between, "effective_neighbors": mixing.effective_neighbors(weights),
               "product_gap": mixing.product_gap(weights, uploads["text_adapter"], self._most_weights(len(sizes)))}
        return Aggregated(downloads, {**server_state, "bank": bank, "members": members}, to_host(log))

    def distances(self, text_adapters):
        """d_kj between LoRA uploads, leaves [S, …] → [S, S]."""
        c = self.config.ata
        return distances(text_adapters, c.neighbors, c.space)

    def weights(self, between, sizes, tasks, client_ids):
        """Mixing matrix [S, S] of LoRA from the distances [S, S]."""
        c, sizes = self.config.ata, jnp.asarray(sizes)
        if self.config.text_aggregation == "mean":
            return mixing.mean(sizes)
        if self.config.text_aggregation == "per_task_mean":
            tasks = jnp.asarray(tasks)
            return mixing.per_task_mean(sizes, tasks, int(jnp.max(tasks)) + 1)[tasks]
        options = {"weighting": c.weighting, "temperature": c.temperature, "auto_factor": c.auto_factor,
                   "include_self": c.include_self, "size_weighted": c.size_weighted}
        if c.preset == "notes":  # the formula of the user's notes: w ∝ exp(−d) over the neighbours and oneself
            options = {"weighting": "softmax", "temperature": 1.0, "include_self": True, "size_weighted": False}
        return mixing.ata_weights(between, sizes, jnp.asarray(client_ids), neighbors=c.neighbors, **options)

    def _most_weights(self, cohort: int) -> int:
        """How many weights of a row of ours can be above 0; a subclass' `weights` may have more."""
        ours = type(self).weights is Pilot.weights and self.config.text_aggregation == "ata"
        return self.config.ata.neighbors + 1 if ours else cohort

    def _aggregate_tasks(self, uploads, sizes, tasks, client_ids, server_state):
        """ψ_t per task, and every client's last upload.

        A task without an upload keeps its ψ_t. Where, after round 1, all of a task's uploads come from clients in
        their first round, the last uploads of its earlier participants stay in the mean: a lone newcomer does not
        overwrite its task.
        """
        now = server_state["round"]
        members = dict(server_state["members"])
        earlier = {c: m for c, m in members.items() if m["first_round"] < now}
        own = to_host(uploads)
        for row, client in enumerate(client_ids):
            first = members.get(int(client), {"first_round": now})["first_round"]
            members[int(client)] = {"first_round": first, "task": int(tasks[row]), "size": int(sizes[row]),
                                    "adapter": jax.tree.map(lambda leaf, r=row: leaf[r].copy(), own)}
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
        return to_host(bank), members

    def sent_bytes(self, adapters):
        up = {name: num_bytes(adapters[name]) for name in ("text_adapter", "task")}
        # The own task's ψ_t comes as a slot of the bank, once.
        task = "task_bank" if self.config.cross_task else "task"
        return up, {name: num_bytes(adapters[name]) for name in ("text_adapter", task)}
