"""Pilot (Xiong et al., "Pilot: Building the Federated Multimodal Instruction Tuning Framework", AAAI 2025,
arXiv 2501.13985): task and client visual adapters, a cross-task mixture of adapters, ATA over LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key
from pydantic import Field, model_validator

from pilot_jax.config import Section, StrategyParams
from pilot_jax.federation import mixing
from pilot_jax.federation.cohort import Aggregated, Cohort
from pilot_jax.federation.defence import Defence, clip_changes
from pilot_jax.federation.distances import distances
from pilot_jax.federation.halves import shares
from pilot_jax.federation.roles import BASE_ROWS, Mode, Role, Roles, Tree, float32, num_bytes
from pilot_jax.federation.shortlist import can_shortlist, nearest
from pilot_jax.federation.strategies.base import Strategy, register
from pilot_jax.models.lora import init_lora
from pilot_jax.parallel.processes import to_host
from pilot_jax.programs import KeptJit


def _zero_last(adapter):
    """Returns the MLP with a zero last layer: it adds nothing at first, and its first layer lets the last one learn."""
    return {"linear_1": adapter["linear_1"], "linear_2": jax.tree.map(jnp.zeros_like, adapter["linear_2"])}


def _repeat(tree, times: int):
    return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (times, *leaf.shape)), tree)


@partial(KeptJit, static=("features", "tasks"))
def init_router(key: Key[Array, ""], features: int, tasks: int) -> Float[Array, "features tasks"]:
    """Returns the weights of a new router, float32, normal with standard deviation 0.02."""
    return 0.02 * jax.random.normal(jax.random.fold_in(key, 1000), (features, tasks))


def _with_last_uploads(members: Mapping[int, dict[str, Any]], cohort: Cohort) -> dict[int, dict[str, Any]]:
    """Returns `members` updated with the cohort's clients: first round, task, size and last ψ_t of each."""
    out, own = dict(members), to_host(cohort.uploads["task"])
    for row, client in enumerate(int(c) for c in cohort.ids):
        first = out.get(client, {"first_round": cohort.round})["first_round"]
        out[client] = {"first_round": first, "task": int(cohort.tasks[row]), "size": int(cohort.sizes[row]),
                       "adapter": jax.tree.map(lambda leaf, r=row: leaf[r].copy(), own)}
    return out


class AtaConfig(Section):
    """Options of ATA, Adaptive Text-adapter Aggregation (paper §3.4): the mixture of LoRA that each client receives."""

    preset: Literal["default", "notes"] = Field(
        "default", description="Choice between the keys below (default) and a fixed plain reading of the paper "
        "(notes): weights ∝ exp(−d), d between the factors A and B, own upload included, no weighting by size. With "
        "notes, all keys below but `neighbors` are ignored.")
    neighbors: int = Field(2, ge=1, description="Number M of nearest other clients that a client's LoRA is mixed with. "
                           "If the cohort has fewer, all of them.")
    weighting: Literal["softmax", "inverse_distance", "share", "share_of_sizes", "split_half"] = Field(
        "softmax", description="Rule for the weight of a neighbour at distance d. softmax: ∝ exp(−d/τ), also for the "
        "client's own upload at d = 0. inverse_distance: ∝ 1/d; the own upload weighs as much as the nearest "
        "neighbour. share: ∝ 1/d; the own upload weighs as much as the client has training samples. share_of_sizes: "
        "the own upload has the client's share of its and its neighbours' training samples; the rest is ∝ 1/d. "
        "split_half: no distances and no neighbours; the weight of any other client is ∝ n_j·max(0, 1 − ρ/limit), with "
        "ρ the measured ratio of how far the two clients' gradients are apart to the noise of the client's own "
        "(docs/method.md), and `split_half_limit`.")
    split_half_limit: float = Field(0.5, gt=0, description="Ratio ρ at and above which `weighting: split_half` takes "
                                    "nothing from another client.")
    temperature: Literal["auto"] | float = Field(
        "auto", description="Temperature τ of `weighting: softmax`. auto: `auto_factor` times the client's mean "
        "distance to its M neighbours, so that weights do not depend on the scale of the adapters.")
    auto_factor: float = Field(0.25, gt=0, description="Factor in `temperature: auto`. With all M neighbours at "
                               "the same distance, the client's own upload weighs 1/(1 + M/e) at factor 1 and "
                               "1/(1 + M/e⁴) at 0.25. docs/results.md has scores for several factors.")
    mixes: Literal["models", "updates"] = Field(
        "models", description="What ATA mixes. models: the uploaded LoRAs, as in the paper. updates: the clients' "
        "changes of LoRA in the phase, each mixture then added to the LoRA with which the client began it.")
    space: Literal["factors", "product"] = Field("factors", description="Vectors between which distances are measured. "
                                                 "factors: all entries of A and B. product: all entries of B·A.")
    include_self: bool = Field(True, description="Whether the client's own upload is part of its mixture.")
    size_weighted: bool = Field(False, description="Whether weights are multiplied by the clients' numbers of training "
                                "samples before they are normalised.")

    foolsgold: bool = Field(False, description="Whether clients whose changes of LoRA, summed over all phases, nearly "
                            "repeat another client's weigh less in the others' mixtures, as in FoolsGold. It also hits "
                            "honest clients with equal data.")
    cap_one: float | None = Field(None, ge=0, le=1, description="Largest weight of any one other client in a client's "
                                  "mixture. What exceeds it goes to the client's own upload. null: no limit.")
    cap_all: float | None = Field(None, ge=0, le=1, description="Largest weight of all other clients together. What "
                                  "exceeds it goes to the client's own upload. null: no limit.")

    @model_validator(mode="after")
    def _positive_temperature(self) -> AtaConfig:
        if self.temperature != "auto" and not self.temperature > 0:
            raise ValueError("temperature must be 'auto' or > 0")
        return self


class PilotParams(StrategyParams):
    """Keys of Pilot: the start of its adapters, ATA, and its ablations."""

    init: Literal["preserve", "copy"] = Field(
        "preserve", description="Start of Pilot's adapters ψ_s and ψ_c. preserve: their last layer is zero, so step 0 "
        "computes the base model. copy: copies of the projector, as in the authors' code; ψ_t and ψ_s then stay equal.")
    ata: AtaConfig = AtaConfig()
    text_aggregation: Literal["ata", "mean", "per_task_mean"] = Field(
        "ata", description="Aggregation of LoRA by Pilot's server. ata: each client has its own mixture. Ablations: "
        "mean (over all clients) and per_task_mean (over the clients of the task), both weighted by training samples.")
    client_adapter: Literal["both", "stage1", "none"] = Field(
        "both", description="Stages in which Pilot's client adapter adds x_s = ψ_s(H_v): both, as in the paper; stage1 "
        "or none, as ablations.")
    cross_task: bool = Field(True, description="Whether Pilot trains stage 2, the cross-task mixture of adapters. "
                             "false (ablation): stage 1 in every phase.")


@register("pilot")
class Pilot(Strategy):
    """Pilot. `text_aggregation`, `client_adapter`, `cross_task` and `ata` of `params` allow ablations.

    To change the aggregation of LoRA, override `distances` or `weights`.
    """

    Params = PilotParams

    one_model = False

    @property
    def _reads_ata(self):
        """Whether LoRA is mixed by ATA, and by the keys below its preset."""
        return self.params.text_aggregation == "ata" and self.params.ata.preset == "default"

    @property
    def splits_halves(self):
        return self._reads_ata and self.params.ata.weighting == "split_half"

    @property
    def mixes_updates(self):
        return self._reads_ata and self.params.ata.mixes == "updates"

    @property
    def clips(self):
        return True

    @property
    def defence(self):
        c = self.params.ata
        return Defence(self.params.clip, c.foolsgold, c.cap_one, c.cap_all) if self._reads_ata else Defence(
            self.params.clip)

    @property
    def first_stages(self):
        return ("stage1", "stage2") if self.params.cross_task else ("stage1", "stage1")

    @property
    def later_stages(self):
        return self.first_stages[1:]

    def roles(self):
        c = self.params
        rows = [*BASE_ROWS,
                Role("text_adapter", {"stage1": "trained", "stage2": "trained"}, "shared", c.text_aggregation),
                Role("task", {"stage1": "trained", "stage2": "trained"}, "shared", "per_task_mean")]
        if c.client_adapter != "none":
            in_stage2: Mode = "frozen" if c.client_adapter == "both" else "-"
            rows.append(Role("client", {"stage1": "trained", "stage2": in_stage2}, "local", "never"))
        if c.cross_task:
            rows += [Role("task_bank", {"stage1": "-", "stage2": "frozen"}, "received", "never"),
                     Role("cross_task", {"stage1": "-", "stage2": "trained"}, "local", "never"),
                     Role("router", {"stage1": "-", "stage2": "trained"}, "local", "never")]
        return Roles(tuple(rows))

    def initial_adapters(self, key, projector, model, rank, num_tasks):
        """Returns the first adapters. preserve: ψ_t is the projector, and ψ_s and ψ_c add zero, so step 0 computes the
        base model. copy: as in the authors' code, every MLP is a copy of the projector."""
        projector = float32(projector)
        extra = projector if self.params.init == "copy" else _zero_last(projector)
        every = {
            "text_adapter": init_lora(key, model.text, rank),
            "task": projector,
            "client": extra,
            "task_bank": _repeat(projector, num_tasks),
            "cross_task": _repeat(extra, num_tasks),
            "router": {"kernel": init_router(key, model.vision.feature_size, num_tasks)},
        }
        return {row.subtree: every[row.subtree] for row in self.roles().adapter_rows}

    def warning(self):
        if self.params.init == "copy":
            return ("strategy.init: copy starts ψ_t and ψ_s equal; L_d is symmetric in them, so they stay equal and "
                    "never separate. Set strategy.init=preserve to avoid this.")
        return None

    def combines(self):
        return ("factors",) if self.mixes_updates else ("factors", "product", "aligned")

    def initial_server_state(self, adapters, sizes, tasks):
        bank = adapters["task_bank"] if self.params.cross_task else _repeat(adapters["task"], int(np.max(tasks)) + 1)
        return {"bank": bank, "members": {}}

    def stages(self, first_time, round_):
        return self._stages(first_time)

    def fetch(self, adapters, server, task):
        """Returns the adapters with the server's bank and ψ_t from its slot of the task. LoRA is the client's own."""
        bank = {"task_bank": server["bank"]} if self.params.cross_task else {}
        return {**adapters, "task": jax.tree.map(lambda leaf: leaf[task], server["bank"]), **bank}

    def parts_of(self, downloads, task):
        return {"task": jax.tree.map(lambda leaf: leaf[task], downloads["task_bank"])} if self.params.cross_task else {}

    def aggregate(self, cohort, server):
        if self.defence.clip is not None:
            tasks = clip_changes({"task": cohort.uploads["task"]}, cohort.starts, self.defence.clip)
            cohort = dataclasses.replace(cohort, uploads={**cohort.uploads, **tasks})
        bank, members = self._aggregate_tasks(cohort, server)
        text_adapters = cohort.uploads["text_adapter"]
        kept = dict[str, Any]()
        if self._knows_nearest_alone(text_adapters):
            near = nearest(text_adapters, self.params.ata.neighbors, cohort.ids)
            weights = to_host(mixing.ata_weights_of_nearest(near, jnp.asarray(cohort.sizes), **self._ata_options()))
            log = {"weights": weights.weights, "columns": weights.columns, "distances": near.distances}
        else:
            between = self.distances(text_adapters)
            weights, kept, seen = self.defence.applied(
                to_host(self.weights(between, cohort)), cohort, server, self.mixes_updates,
                between if self._measures_the_mixed else None)
            log = {"weights": weights, "distances": between, **seen}
        downloads = {
            "text_adapter": self.combine_lora(cohort, weights, server),
            "task": jax.tree.map(lambda leaf: leaf[cohort.tasks], bank),
        } | ({"task_bank": bank} if self.params.cross_task else {})
        log["effective_neighbors"] = mixing.effective_neighbors(log["weights"])
        if self.params.combine == "factors" and not self.mixes_updates:
            log["product_gap"] = mixing.product_gap(weights, text_adapters, self.most_weights(len(cohort)))
        return Aggregated(downloads, {**server, "bank": bank, "members": members, **kept}, to_host(log))

    def distances(self, text_adapters):
        """Returns the distances d_kj [S, S] between LoRA uploads with leaves [S, …].

        With ranks that differ, they are those of the products B·A: the factors' entries do not belong together.
        """
        return distances(text_adapters, self.params.ata.neighbors, self._space)

    @property
    def _space(self) -> str:
        c = self.params.ata
        return "product" if self.ranks_differ else "factors" if c.preset == "notes" else c.space

    def weights(self, between, cohort):
        """Returns the mixing matrix [S, S] of LoRA, from the distances [S, S]."""
        c, sizes = self.params.ata, jnp.asarray(cohort.sizes)
        if self.params.text_aggregation == "mean":
            return mixing.mean(sizes)
        if self.params.text_aggregation == "per_task_mean":
            tasks = jnp.asarray(cohort.tasks)
            return mixing.per_task_mean(sizes, tasks, int(jnp.max(tasks)) + 1)[tasks]
        if self.splits_halves:
            return shares(cohort.ratio, cohort.sizes, c.split_half_limit)
        return mixing.ata_weights(between, sizes, jnp.asarray(cohort.ids), **self._ata_options())

    def _ata_options(self) -> mixing.AtaOptions:
        c = self.params.ata
        if c.preset == "notes":  # w ∝ exp(−d) over the neighbours and the client itself
            return {"neighbors": c.neighbors, "weighting": "softmax", "temperature": 1.0, "include_self": True,
                    "size_weighted": False}
        return {"neighbors": c.neighbors, "weighting": c.weighting, "temperature": c.temperature,
                "auto_factor": c.auto_factor, "include_self": c.include_self, "size_weighted": c.size_weighted}

    def _knows_nearest_alone(self, text_adapters: Tree) -> bool:
        """Whether the cohort is so large, above `mixing.DENSE`, that no matrix [S, S] is formed: each client's
        nearest neighbours are found and nothing else. Where a choice needs more than these, the matrices stay."""
        cohort = len(jax.tree.leaves(text_adapters)[0])
        return (cohort > mixing.DENSE and self.most_weights(cohort) < cohort and self.defence == Defence()
                and type(self).distances is Pilot.distances and self.params.combine != "aligned"
                and self._space == "factors" and can_shortlist(text_adapters, self.params.ata.neighbors))

    def most_weights(self, cohort: int) -> int:
        """Returns how many weights of a row can be above 0: M + 1 under ATA, else up to S."""
        return self.params.ata.neighbors + 1 if self._is_ata else cohort

    @property
    def _is_ata(self) -> bool:
        """Whether a client's weights are above 0 for its M nearest others and itself alone."""
        return (type(self).weights is Pilot.weights and self.params.text_aggregation == "ata"
                and not self.splits_halves)

    @property
    def _measures_the_mixed(self) -> bool:
        """Whether `distances` are those of the LoRAs that are mixed, exact for all pairs with weight."""
        return (self._is_ata and type(self).distances is Pilot.distances and self._space == "factors"
                and not self.mixes_updates)

    def _aggregate_tasks(self, cohort: Cohort, server: Mapping[str, Any]) -> tuple[Tree, dict[int, dict[str, Any]]]:
        """Returns ψ_t of every task, and every client's last upload.

        A task without an upload keeps its ψ_t. If, after round 1, all uploads of a task come from clients in their
        first round, the last uploads of its earlier participants are added to the mean, so that a single new client
        does not overwrite the ψ_t of its task.
        """
        earlier = {c: m for c, m in server["members"].items() if m["first_round"] < cohort.round}
        rows, sizes, tasks = [cohort.uploads["task"]], list(cohort.sizes), list(cohort.tasks)
        for task in sorted(set(int(t) for t in cohort.tasks)):
            uploading = {int(c) for c, t in zip(cohort.ids, cohort.tasks, strict=True) if t == task}
            if not uploading & set(earlier):
                absent = [m for c, m in sorted(earlier.items()) if m["task"] == task]
                rows += [jax.tree.map(lambda leaf: leaf[None], m["adapter"]) for m in absent]
                sizes += [m["size"] for m in absent]
                tasks += [task] * len(absent)
        stacked = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rows)
        old = server["bank"]
        num_tasks = jax.tree.leaves(old)[0].shape[0]
        matrix = mixing.per_task_mean(jnp.asarray(sizes), jnp.asarray(tasks), num_tasks)
        present = np.isin(np.arange(num_tasks), cohort.tasks)

        def keep_absent(new, old):
            return np.where(present.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        bank = jax.tree.map(keep_absent, to_host(mixing.apply(matrix, stacked)), to_host(old))
        return bank, _with_last_uploads(server["members"], cohort)

    def sent_bytes(self, adapters):
        up = {name: num_bytes(adapters[name]) for name in ("text_adapter", "task")}
        # ψ_t of the client's task is downloaded as a slot of the bank, once.
        task = "task_bank" if self.params.cross_task else "task"
        return up, {name: num_bytes(adapters[name]) for name in ("text_adapter", task)}
