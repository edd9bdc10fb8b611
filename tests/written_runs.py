"""Writes run folders and results of comparisons of any number of clients, with random numbers in the real format."""

from __future__ import annotations

import json

import numpy as np
from conftest import small_config

from pilot_jax.report.probes import Abilities, Example, Inside
from pilot_jax.runs.manifest import own_files, write_manifest, written

TASKS = ("caption", "ocr", "vqa")
PIXEL = ("data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJ"
         "RU5ErkJggg==")


def clients_of(count):
    """Returns the task of each client; a client's name is long where `count` is 20."""
    names = [(TASKS[i * 3 // count], i) for i in range(count)]
    return {f"{task}_hospital_of_saint_{i}" if count == 20 else f"{task}_{i}": task for task, i in names}


def write_run(folder, count, strategy="pilot", rounds=3, cohort=None, ended=True, seed=0):
    """Writes the folder of a run of `count` clients, of which `cohort` take part in each phase."""
    rng, task_of = np.random.default_rng(seed), clients_of(count)
    names, cohort = list(task_of), cohort or count
    config = small_config(federation={"rounds": rounds}, strategy={"name": strategy}, eval={"every": 1})
    (folder / "mixing").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    lines = []
    for number, (round_, phase) in enumerate([(1, "stage1"), *((r, "stage2") for r in range(1, rounds + 1))]):
        present = sorted(rng.choice(count, cohort, replace=False))
        for i in present:
            loss = float(rng.gamma(2) / (number + 1))
            lines.append({"round": round_, "phase": phase, "client": names[i], "task": task_of[names[i]], "step": 9,
                          "loss": loss, "last_loss": loss / 2})
        lines.append({"round": round_, "phase": phase, "clients": cohort, "client_steps": 9 * cohort,
                      "seconds": float(rng.uniform(9, 30)), "waited_seconds": 0.2, "feature_seconds": 3.0,
                      "bytes_up": 9, "bytes_down": 9, "bytes_up_by_subtree": {"text_adapter": 12_000_000},
                      "bytes_down_by_subtree": {"text_adapter": 12_000_000, "task_bank": 3_500_000}, "quarantined": []})
        weights = rng.dirichlet(np.full(cohort, 0.1), cohort) * 0.3 + 0.7 * np.eye(cohort)
        points = rng.normal(size=(cohort, 3))
        np.savez(folder / "mixing" / f"round_{round_:04d}_{phase}.npz",
                 client_ids=np.asarray([names[i] for i in present]),
                 weights=weights.astype(np.float32), effective_neighbors=(1 / (weights**2).sum(1)).astype(np.float32),
                 distances=np.linalg.norm(points[:, None] - points[None], axis=-1).astype(np.float32))
        if phase == "stage2":
            lines += [{"round": round_, "split": "validation", "client": c, "task": t, "score": float(rng.uniform())}
                      for c, t in task_of.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_manifest(folder, config.to_yaml())
    if ended:
        summary = summary_of(task_of, strategy, rng)
        (folder / "summary.json").write_text(json.dumps(summary))
        files = {name: written(folder / name) for name in [*own_files(folder), "summary.json"]}
        write_manifest(folder, config.to_yaml(), files)
    return folder


def summary_of(task_of, strategy, rng):
    """Returns a summary with random scores."""
    own = {c: round(float(rng.uniform(0.3, 1)), 3) for c in task_of}
    base = {c: round(float(rng.uniform(0, 0.3)), 3) for c in task_of}

    def by_task(scores):
        return {t: float(np.mean([v for c, v in scores.items() if task_of[c] == t])) for t in TASKS}

    return {"strategy": strategy, "seed": 0, "clients": list(task_of), "tasks": list(TASKS), "task_by_client": task_of,
            "score_by_client": own, "score_by_task": by_task(own), "score_mean": float(np.mean(list(own.values()))),
            "score_base_by_client": base, "score_base_by_task": by_task(base),
            "score_base": float(np.mean(list(base.values()))), "client_steps": 4320, "client_steps_per_second": 35.8,
            "bytes_up": 16_109_568, "bytes_down": 25_620_480, "wall_seconds": 180.0, "compile_seconds": 39.0,
            "peak_memory_bytes": 1_880_000_000, "quarantined": 0, "epsilon": None}


def inside_of(run):
    """Returns what the models of a written run might answer."""
    rng, clients = np.random.default_rng(1), run.summary["clients"]
    examples = [Example(c, run.task_of[c], "Is there a red digit in the picture, and is it above the blue one?",
                        "yes, and a green one, too" if wrong else "yes", "no", ("yes",), score, PIXEL)
                for c in clients for wrong, score in ((False, 1.0), (True, 0.0), (True, 0.4))]
    few = len(clients) <= 24
    return Inside(tuple(examples), dict.fromkeys(clients, 24), Abilities(
        tuple(clients), TASKS, rng.uniform(0, 1, (len(clients) + 1, 3)), 8) if few else None,
        {c: rng.dirichlet(np.ones(3)) for c in clients})


def results_of(variants, clients, seeds=3):
    """Returns the results of a comparison as `read_comparison` would."""
    from pilot_jax.compare.differences import differences
    from pilot_jax.compare.statistics import summarise

    rng, task_of = np.random.default_rng(2), clients_of(clients)
    names = ["pilot", "local", "fedavg", *(f"pilot-with_a_long_name_{i}" for i in range(variants - 3))]
    rows = {}
    for name in names:
        level = rng.uniform(0.3, 0.8)
        own = [{c: float(np.clip(level + rng.normal(0, 0.05), 0, 1)) for c in task_of} for _ in range(seeds)]
        rows[name] = {"wall_seconds": 60.0, "seeds": [
            {"diverged": False, "score_mean": float(np.mean(list(one.values()))), "score_by_client": one,
             "score_by_task": {t: float(np.mean([v for c, v in one.items() if task_of[c] == t])) for t in TASKS},
             "base_captions": None, "effective_neighbors": [2.0], "bytes_up": int(rng.integers(1, 9) * 1e6),
             "bytes_down": 2_000_000} for one in own]}
    found = differences(rows)
    return {"name": "compared", "variants": [summarise(n, rows[n]) | {"rate_factor": 1.0, "differences": found[n]}
                                             for n in names],
            "rows": rows, "base": {"score": 0.1, "base_captions": None}, "seeds": seeds, "split": "test",
            "margin": 0.02, "config": {"federation": {"rounds": 3}}, "factors": [1.0], "rates": {}, "warnings": [],
            "seconds_of_all": 600.0, "seconds_of_tuning": 0.0}
