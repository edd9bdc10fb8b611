"""Compares runs whose base is stored in bfloat16, 8 bits and 4 bits: memory of the base, losses and scores.

    python benchmarks/quantised.py [CONFIG] [--base bf16 int8 nf4] [--set KEY=VALUE ...] [--json FILE]

Every run has the same seed, data and schedule; default: the quickstart. "MB" is what the base takes, "captions" the
score of the untrained base on what it was pretrained on (only the embedded base has such data), "loss" the mean of the
clients' last losses of the last phase, and "score" that of the trained clients on the test split.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).parent.parent
COLUMNS = {"base": "", "MB": ".2f", "captions": ".3f", "loss": ".4f", "score": ".3f"}


def measure(config: Path, base: str, overrides: list[str]) -> dict:
    import pilot_jax
    from pilot_jax.config import load_config
    from pilot_jax.evaluation.personalised import base_prompts, forgetting

    run = pilot_jax.simulate(load_config(config, [*overrides, f"model.base={base}"]))
    one, captions = run.evaluation, float("nan")
    if one.embedded_base:
        captions = forgetting([one], [None], [base_prompts(one, 240)])[0][0]
    losses = [record["last_loss"] for record in run.records if "last_loss" in record][-len(run.federation.clients):]
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(run.federation.model.base))
    return {"base": base, "MB": size / 1e6, "captions": captions, "loss": float(np.mean(losses)),
            "score": run.summary["score_mean"], "by_task": run.summary["score_by_task"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, nargs="?", default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--base", nargs="*", choices=("bf16", "int8", "nf4", "null"), default=["bf16", "int8", "nf4"])
    parser.add_argument("--set", nargs="*", default=[], dest="overrides", metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print(" ".join(f"{name:>9}" for name in COLUMNS) + "  by task")
    rows = []
    for base in args.base:
        rows.append(measure(args.config, base, args.overrides))
        print(" ".join(f"{rows[-1][name]:>9{form}}" for name, form in COLUMNS.items()),
              ", ".join(f"{task} {score:.3f}" for task, score in rows[-1]["by_task"].items()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
