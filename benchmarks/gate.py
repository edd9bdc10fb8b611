"""Prints how well a gate on fresh samples chooses what to take from others, in place of split-half weights.

usage: python benchmarks/gate.py CONFIG [--held 0.5] [--errors 1] [--set KEY=VALUE …]

A share of each client's samples is held back at first. In every phase another part of it, on which nobody has trained,
scores four mixtures of the clients' changes of LoRA (the client's own alone, split-half weights, the mean of its task,
the mean of all); after that it is trained on. Losses are compared with those of the client's own, sample by sample,
over all phases so far. A client takes the mixture with the lowest mean among those that are better than its own by
`--errors` standard errors, else its own.
"""

from __future__ import annotations

import argparse
import collections
from typing import Any, ClassVar

import jax
import numpy as np

from pilot_jax.compare.runner import make_field
from pilot_jax.compare.together import finetune_all, run_all
from pilot_jax.config import load_config
from pilot_jax.evaluation.scores import final_scores
from pilot_jax.federation import mixing
from pilot_jax.federation.client import client_loss
from pilot_jax.federation.cohort import Aggregated
from pilot_jax.federation.halves import shares
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.state import Federation
from pilot_jax.federation.strategies.base import Strategy, register
from pilot_jax.federation.strategies.split_half import SplitHalf
from pilot_jax.parallel.processes import to_host

MIXTURES = ("own", "split-half", "task", "all")


class Fresh:
    """The samples of a federation that are held back, and released phase by phase."""

    def __init__(self, fed: Federation, share: float) -> None:
        self.fed, self.phases = fed, fed.settings.rounds + 1
        self.weights = [np.array(client.train["target_weights"]) for client in fed.clients]
        orders = [np.random.default_rng([fed.seed, k]).permutation(c.size)[:round(c.size * share)]
                  for k, c in enumerate(fed.clients)]
        self.parts = [[order[phase::self.phases] for phase in range(self.phases)] for order in orders]
        self.losses = jax.jit(jax.vmap(self._loss, in_axes=(None, 0)))
        for client in fed.clients:
            client.train["target_weights"] = np.array(client.train["target_weights"])
        self.release(0)

    def _loss(self, adapters: Any, row: Any) -> jax.Array:
        batch = jax.tree.map(lambda leaf: leaf[None], row)
        return client_loss(self.fed.phase("plain"), self.fed.model.base, adapters, {}, batch, 0)[0]

    def release(self, phase: int) -> None:
        """Lets the clients train on what was scored before a phase, and on nothing that is still held back."""
        for client, weights, parts in zip(self.fed.clients, self.weights, self.parts, strict=True):
            held = np.concatenate([*parts[phase:], np.zeros(0, int)]).astype(int)
            client.train["target_weights"][:] = weights
            client.train["target_weights"][held] = 0

    def score(self, client: int, phase: int, adapters: Any) -> np.ndarray:
        """Returns the loss of each sample that a client holds back until after a phase."""
        rows = self.parts[client][phase] if phase < self.phases else np.zeros(0, int)
        if not len(rows):
            return np.zeros(0)
        padded = np.resize(rows, max(len(own[0]) for own in self.parts))
        data = {name: np.asarray(array[padded]) for name, array in self.fed.clients[client].train.items()}
        data["target_weights"] = self.weights[client][padded]
        return np.asarray(self.losses(adapters, data))[:len(rows)]


@register("gate")
class Gate(SplitHalf):
    """Split-half with a gate; `fresh` and `errors` are set before a run, `chosen` is filled by it."""

    measured = ("text_adapter",)
    fresh: Any = None
    errors = 1.0
    chosen: ClassVar[list[list[str]]] = []

    def roles(self):
        return Strategy.roles(self)  # the projector is uploaded, because models are scored at the server, and not mixed

    def initial_server_state(self, adapters, sizes, tasks):
        return {"compared": [np.zeros((0, len(MIXTURES)))] * len(sizes), "phase": 0}

    def aggregate(self, cohort, server):
        size, phase, tasks = len(cohort), server["phase"], np.asarray(cohort.tasks)
        matrices = [np.eye(size), shares(cohort.ratio, cohort.sizes, self.params.split_half_limit),
                    to_host(mixing.per_task_mean(cohort.sizes, tasks, tasks.max() + 1))[tasks],
                    to_host(mixing.mean(cohort.sizes))]
        mixtures = [to_host(self._mixed(cohort, matrix, ("text_adapter",))) for matrix in matrices]
        projectors = to_host(cohort.uploads["projector"])
        compared, choice = list(server["compared"]), list[int]()
        for k in range(size):
            losses = np.stack([self.fresh.score(k, phase, jax.tree.map(lambda leaf, k=k: leaf[k], {
                **mixture, "projector": projectors})) for mixture in mixtures], axis=1)
            compared[k] = np.concatenate([compared[k], losses - losses[:, :1]])
            choice.append(self._choose(compared[k]))
        self.fresh.release(phase + 1)
        self.chosen.append([MIXTURES[c] for c in choice])
        weights = np.stack([matrices[c][k] for k, c in enumerate(choice)]).astype(np.float32)
        lora = jax.tree.map(lambda *leaves: np.stack([leaves[c][k] for k, c in enumerate(choice)]),
                            *(mixture["text_adapter"] for mixture in mixtures))
        return Aggregated({"text_adapter": lora, "projector": projectors},
                          {"compared": compared, "phase": phase + 1}, {"weights": weights})

    def _choose(self, compared: np.ndarray) -> int:
        """Returns the index of the mixture that the differences [n, 4] to the client's own support."""
        if len(compared) < 3:
            return 0
        mean, error = compared.mean(0), compared.std(0, ddof=1) / np.sqrt(len(compared))
        better = [c for c in range(1, len(MIXTURES)) if mean[c] + self.errors * error[c] < 0]
        return min(better, key=lambda c: mean[c]) if better else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--held", type=float, default=0.5, help="share of the samples held back at first")
    parser.add_argument("--errors", type=float, default=1.0, help="standard errors by which to be better")
    parser.add_argument("--set", action="append", default=[], help="config key to set, section.key=value")
    args = parser.parse_args()
    field = make_field(load_config(args.config, ["strategy.name=gate", *args.set]), [0])
    fed = field.setups[0].federation
    Gate.fresh, Gate.errors = Fresh(fed, args.held), args.errors
    states, observers = run_all(field.setups), [RunObserver()]
    Gate.fresh.release(Gate.fresh.phases)
    tuned = finetune_all(field.setups, states, observers)
    scores, = final_scores([field.setups[0].evaluation], states, tuned)
    fine = "" if scores.finetuned is None else f", fine-tuned {np.mean(list(scores.finetuned.values())):.3f}"
    print(f"score {np.mean(list(scores.own.values())):.3f}{fine}")
    for phase in sorted({0, len(Gate.chosen) // 2, len(Gate.chosen) - 1}):
        print(f"phase {phase + 1}: " + ", ".join(f"{n} of {m}" for m, n in collections.Counter(
            Gate.chosen[phase]).most_common()))


if __name__ == "__main__":
    main()
