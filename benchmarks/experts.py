"""Prints what CT-MoA's experts are worth: a Pilot run's scores with each expert alone, and the router's shares.

usage: python benchmarks/experts.py CONFIG [--set KEY=VALUE …]

Trains the config (its strategy must be Pilot or one of its kind) and scores every client's final model on its test data
as it is, with equal shares of all experts, with its own task's expert alone, and with each other expert alone. The best
of these for a client, chosen on its test data, is an upper bound on what a router that chooses one expert per client
could reach. Shares: mean over image tokens of the router's probabilities, for the own expert and for the others.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pilot_jax
from pilot_jax.config import load_config
from pilot_jax.evaluation.personalised import examinee
from pilot_jax.evaluation.results import results

Adapters = dict[str, Any]


def summed(one: Any, other: Any) -> Any:
    """Returns the adapter that adds two adapters' outputs: their hidden layers side by side."""
    first = {name: np.concatenate([one["linear_1"][name], other["linear_1"][name]], axis=-1)
             for name in ("kernel", "bias")}
    last = {"kernel": np.concatenate([one["linear_2"]["kernel"], other["linear_2"]["kernel"]], axis=-2),
            "bias": np.asarray(one["linear_2"]["bias"]) + np.asarray(other["linear_2"]["bias"])}
    return {"linear_1": first, "linear_2": last}


def stacked(adapter: Any, like: Any) -> Any:
    """Returns an adapter repeated for all experts, leaves [T, …]."""
    tasks = jax.tree.leaves(like)[0].shape[0]
    return jax.tree.map(lambda leaf: np.broadcast_to(leaf, (tasks, *np.shape(leaf))), adapter)


def with_expert(adapters: Adapters, task: int, expert: int) -> Adapters:
    """Returns the adapters of a client of a task, all of whose experts compute what the given one does."""
    bank, cross = adapters["task_bank"], adapters["cross_task"]
    one, beside = (jax.tree.map(lambda leaf: np.asarray(leaf[expert]), tree) for tree in (bank, cross))
    zero = jax.tree.map(np.zeros_like, beside)
    if expert == task:
        one, beside = adapters["task"], zero
    return {**adapters, "task": summed(one, beside), "task_bank": stacked(one, bank),
            "cross_task": stacked(beside, cross)}


def router_shares(adapters: Adapters, features: np.ndarray) -> np.ndarray:
    """Returns the router's mean probabilities, float [T]."""
    logits = jnp.asarray(features, jnp.float32) @ jnp.asarray(adapters["router"]["kernel"])
    return np.asarray(jnp.mean(jax.nn.softmax(logits, axis=-1), axis=(0, 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], help="config key to set, section.key=value")
    args = parser.parse_args()
    config = load_config(args.config, args.set)
    run = pilot_jax.simulate(config)
    fed, evaluation = run.federation, run.evaluation
    tasks = range(len(fed.tasks))
    print("| client | as trained | equal shares | own expert | best other expert | router's share of the own expert | "
          "of the others |\n|---|---:|---:|---:|---:|---:|---:|")
    rows = []
    for k, client in enumerate(evaluation.clients):
        task, prompts = fed.task_index(k), client.evaluation["test"]
        own = examinee(fed, k, run.population[k], prompts, client.task)
        uniform = {**own.adapters, "router": jax.tree.map(np.zeros_like, own.adapters["router"])}
        asked = [own.adapters, uniform, *(with_expert(own.adapters, task, expert) for expert in tasks)]
        found = [results(fed.model, evaluation.decoder, [dataclasses.replace(own, adapters=one)], evaluation.metrics, 1,
                         evaluation.scoring)[0].score for one in asked]
        shares = router_shares(own.adapters, np.asarray(client.train["features"][np.arange(client.size)]))
        others = [found[2 + e] for e in tasks if e != task]
        rows.append([found[0], found[1], found[2 + task], max(others), shares[task], *np.delete(shares, task)])
        print(f"| {client.name} | " + " | ".join(f"{x:.3f}" for x in rows[-1][:5]) + " | "
              + ", ".join(f"{x:.3f}" for x in rows[-1][5:]) + " |", flush=True)
    print("| mean | " + " | ".join(f"{x:.3f}" for x in np.mean(rows, axis=0)[:5]) + " | "
          + ", ".join(f"{x:.3f}" for x in np.mean(rows, axis=0)[5:]) + " |")


if __name__ == "__main__":
    main()
