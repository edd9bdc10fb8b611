"""Measures what refused uploads cost the other clients: scenario A with bad clients and without them.

    python benchmarks/bad_clients.py [--seeds 1] [--set federation.local_steps=1 …]

In every round, one of nine clients sends NaN, or two of nine send 1e6 times their update. The table has the mean
test score of the other clients. No GPU is needed; a run takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np

from pilot_jax.config import load_config
from pilot_jax.runs.prepare import prepare
from pilot_jax.runs.simulate import simulate

CONFIG = Path(__file__).parent.parent / "configs" / "scenario_a.yaml"
RATES = ["train.lr_connector=0.0006", "train.lr_lora_stage1=0.003", "train.lr_lora_stage2=0.0018"]


def nan(upload, start):
    return jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), upload)


def scaled(upload, start):
    return jax.tree.map(lambda leaf, before: (before + 1e6 * (leaf - before)).astype(leaf.dtype), upload, start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], help="changes of the config, as section.key=value")
    args = parser.parse_args()
    seeds, changes = args.seeds, args.set
    names = [c.name for c in prepare(load_config(CONFIG, changes)).federation.clients]
    print("| | without them | with them | difference | refused uploads |\n|---|---:|---:|---:|---:|")
    for what, bad, attack in (("1 of 9 sends NaN", ("ocr_1",), nan),
                              ("2 of 9 send 1e6 times their update", ("caption_0", "vqa_2"), scaled)):
        others = [n for n in names if n not in bad]
        scores, refused = {"without": [], "with": []}, 0
        for seed in range(seeds):
            sets = [*RATES, *changes, f"system.seed={seed + 2}", f"data.digits.seed={seed + 2}"]
            config = load_config(CONFIG, sets)
            listed = [{"round": r, "clients": others} for r in range(1, config.federation.rounds + 1)]
            without = simulate(load_config(CONFIG, [*sets, f"federation.participation={listed}"]))
            run = simulate(config, tamper=lambda client, round_, upload, start, bad=bad, attack=attack:
                           attack(upload, start) if client in bad else upload)
            for key, one in (("without", without), ("with", run)):
                scores[key].append(np.mean([one.summary["score_by_client"][n] for n in others]))
            refused += run.summary["quarantined"]
        means = {key: float(np.mean(values)) for key, values in scores.items()}
        print(f"| {what} | {means['without']:.3f} | {means['with']:.3f} | {means['with'] - means['without']:+.3f} | "
              f"{refused} |", flush=True)


if __name__ == "__main__":
    main()
