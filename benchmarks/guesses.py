"""Prints what answers score that look at no picture and ask no model, on the data of a config.

    python benchmarks/guesses.py CONFIG [--seeds 5] [--split test] [--set KEY=VALUE …]

"most common": each client's most common training answer. "by question": the most common training answer to the same
question among the clients of the task, or the former where the question is new. Means over clients and seeds, with the
metrics of the config. Nothing is trained and no model is loaded; `pilot-jax compare` has the same two rows.
"""

from __future__ import annotations

import argparse

import numpy as np

from pilot_jax.config import load_config
from pilot_jax.evaluation.scores import guessed_scores
from pilot_jax.runs.prepare import load_samples, seeded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--split", default="test")
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="config key to set, KEY=VALUE")
    args = parser.parse_args()
    config, scores, tasks = load_config(args.config, args.overrides), dict[tuple[str, str], list[float]](), set[str]()
    for seed in range(args.seeds):
        samples = load_samples(seeded(config, seed))
        task_of = {s.client: s.task for s in samples}
        tasks |= set(task_of.values())
        for way, by_client in guessed_scores(samples, config.eval.metrics, args.split).items():
            for client, score in by_client.items():
                scores.setdefault((way, task_of[client]), []).append(score)
                scores.setdefault((way, ""), []).append(score)
    print(f"| | all | {' | '.join(sorted(tasks))} |\n|---|{'---:|' * (len(tasks) + 1)}")
    for way, name in (("majority", "most common"), ("question", "by question")):
        print(f"| {name} | " + " | ".join(f"{np.mean(scores[way, task]):.3f}" for task in ("", *sorted(tasks))) + " |")


if __name__ == "__main__":
    main()
