"""SCAFFOLD (Karimireddy et al., ICML 2020, arXiv 1910.06378): clients follow g − c_k + c instead of g.

After a phase, a client's control c_k is the mean of its gradients over its steps. For SGD at a constant rate this
equals the paper's option II, c_k − c + (x − y_k)/(S_k·η); it also applies to a schedule and to AdamW. Weights are
n_k/Σn, as in `fedavg`, where the paper has 1/N; for clients of equal size both agree.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pilot_jax.federation import mixing
from pilot_jax.federation.cohort import Aggregated
from pilot_jax.federation.phases import LocalRule
from pilot_jax.federation.roles import Role, Roles, num_bytes
from pilot_jax.federation.strategies.base import Strategy, register
from pilot_jax.federation.strategies.fedopt import ServerParams
from pilot_jax.parallel.processes import to_host


@dataclasses.dataclass(frozen=True)
class Controlled(LocalRule):
    """Adds c − c_k to the gradient g, and makes the mean of g the new c_k."""

    averages_gradients: bool = True

    def gradient(self, gradient, trained, start, carried):
        return jax.tree.map(lambda g, own, all_: g - own + all_, gradient, carried["control"],
                            carried["server_control"])

    def carry(self, mean_gradient, carried):
        change = jax.tree.map(jnp.subtract, mean_gradient, carried["control"])
        return {**carried, "control": mean_gradient, "control_change": change}


@register("scaffold")
class Scaffold(Strategy):
    """SCAFFOLD; the module's text describes it."""

    Params = ServerParams
    needs_one_rank = True

    def roles(self):
        rows = super().roles().rows
        return Roles((*rows,
                      Role("control", {"plain": "carried"}, "local", "never"),
                      Role("control_change", {"plain": "carried"}, "shared", "mean"),
                      Role("server_control", {"plain": "carried"}, "received", "never")))

    def local_rule(self):
        return Controlled()

    def initial_adapters(self, key, projector, model, rank, num_tasks):
        trained = super().initial_adapters(key, projector, model, rank, num_tasks)
        zero = jax.tree.map(jnp.zeros_like, trained)
        return {**trained, "control": zero, "control_change": zero, "server_control": zero}

    def combines(self):
        return ("factors",)  # controls are gradients of the entries of A and B

    def _model(self):
        """Returns the names of the subtrees that the server averages as a model: LoRA and, unless frozen, projector."""
        return tuple(name for name in self.roles().names(scope="shared") if name != "control_change")

    def server_optimizer(self):
        return optax.sgd(self.params.server.learning_rate or 1.0)

    def initial_server_state(self, adapters, sizes, tasks):
        model = {n: adapters[n] for n in self._model()}
        return {"model": model, "optimizer": self.server_optimizer().init(model), "control": adapters["server_control"],
                "total_size": int(np.sum(sizes))}

    def fetch(self, adapters, server, task):
        return {**adapters, **server["model"], "server_control": server["control"]}

    def aggregate(self, cohort, server):
        models = {n: t for n, t in cohort.uploads.items() if n != "control_change"}
        downloads, state, log = super().aggregate(dataclasses.replace(cohort, uploads=models), server)
        share = jnp.asarray(cohort.sizes, jnp.float32)[None] / state["total_size"]
        moved = mixing.apply(share, cohort.uploads["control_change"])
        state["control"] = jax.tree.map(lambda c, d: to_host(c + d[0]), state["control"], moved)
        return Aggregated({**downloads, "server_control": state["control"]}, state, log)

    def sent_bytes(self, adapters):
        size = {n: num_bytes(adapters[n]) for n in self._model()}
        control = num_bytes(adapters["control"])
        return {**size, "control_change": control}, {**size, "server_control": control}
