"""Tests that every benchmark runs, at its smallest size. Their measurements are in `docs/` and are not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from scipy import stats

BENCHMARKS = ROOT / "benchmarks"
TINY = [str(ROOT / "configs" / "benchmark" / "digits.yaml"), *(
    word for key in ("federation.rounds=1", "federation.local_steps=1", "federation.finetune_steps=null",
                     "data.digits.train=4", "data.digits.test=2", "data.digits.clients_per_task=1")
    for word in ("--set", key))]
SMALLEST = {
    "aggregation.py": ["--cohort", "8", "20", "--parameters", "1e5", "--repetitions", "1", "--large", "64", "300",
                       "--large-parameters", "2e4", "--streamed", "400", "3e4", "--projected", "1000"],
    "aggregation_on_disk.py": ["--cohort", "20", "--parameters", "1e5"],
    "attacks.py": [os.devnull, "--seeds", "1", "--settings", "pilot", "--attacks", "labels", "--attackers", "1",
                   "--set", "federation.rounds=1", "federation.local_steps=1", "data.digits.train=8",
                   "data.digits.test=2"],
    "bad_clients.py": ["--set", "federation.rounds=1", "federation.local_steps=1", "data.digits.train=8",
                       "data.digits.test=2", "eval.max_new_tokens=2"],
    "cells.py": [f"all={ROOT / 'docs' / 'results' / 'all_strategies.json'}", "--of", "pilot"],
    "experts.py": TINY,
    "gate.py": TINY,
    "guesses.py": [*TINY, "--seeds", "1"],
    "intervals.py": ["--repetitions", "3"],
    "operands.py": ["--steps", "2", "--repetitions", "1"],
    "privacy_audit.py": ["--trials", "40", "--epsilon", "1"],
    "peer.py": ["--repetitions", "1", "--steps", "2"],
    "quantised.py": [*TINY[:1], "--base", "nf4", "--set", *(word for word in TINY[1:] if word != "--set")],
    "scaling.py": ["--only", "chunk"],
    "startup.py": ["--repetitions", "1"],
    "step.py": ["--top", "3"],
    "tower_probe.py": ["embedded"],
    "uneven.py": ["--clients", "4", "--largest", "20", "--repetitions", "1"],
}
NOT_RUN = {
    "accelerator.py": "test_accelerator.py runs it", "accelerator_parts.py": "a part of accelerator.py",
    "accelerator_torch.py": "a part of accelerator.py",
    "large_cohorts.py": "a part of aggregation.py",
    "memory.py": "six quickstarts", "population.py": "prepares 128 clients",
    "projection.py": "its smallest size is its only one, and takes minutes",
    "torch_peer.py": "a part of peer.py",
}
PEERS = BENCHMARKS / "peers"  # needs environments of its own; what this one can run of it is below


@pytest.mark.long
@pytest.mark.parametrize("name", SMALLEST)
def test_benchmark_runs(name, tmp_path):
    kept = {"PILOT_JAX_KEEP": "1", "PILOT_JAX_CACHE": str(tmp_path)}  # as for users; other tests keep nothing
    done = subprocess.run([sys.executable, BENCHMARKS / name, *SMALLEST[name]], capture_output=True, text=True,
                          env=os.environ | kept)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip()


def test_no_benchmark_is_forgotten():
    assert {path.name for path in BENCHMARKS.glob("*.py")} == SMALLEST.keys() | NOT_RUN.keys()


@pytest.mark.long
def test_peers_do_the_same_work(tmp_path):
    def run(script, *arguments):
        done = subprocess.run([sys.executable, PEERS / script, tmp_path / "work", *arguments], capture_output=True,
                              text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    run("work.py", "--clients", "2")
    ours, theirs = (json.loads(run(script)) for script in ("with_pilot_jax.py", "with_torch.py"))
    for key in ("lora_norm", "change_norm", "loss_first_round", "loss_last_round"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-3)


def test_cells_of_fine_tuned_models():
    file = ROOT / "docs" / "results" / "cells" / "newcomers_same.json"
    done = subprocess.run([sys.executable, BENCHMARKS / "cells.py", f"same={file}", "--models", "fine-tuned"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text())["rows"]
    one, other = ([seed["score_finetuned"] for seed in rows[name]["seeds"]] for name in ("split_half", "local"))
    assert f"| same | {np.mean(one) - np.mean(other):+.3f} [" in done.stdout


@pytest.mark.parametrize(("other", "key"), [
    ("newcomers_same", "federation.joins"), ("shared_same", "data.digits.wording"), ("shared_same_48", "data.digits.")])
def test_cells_of_unlike_runs(other, key):
    """Files are joined only where they are of the same data and federation."""
    files = "+".join(str(ROOT / "docs" / "results" / "cells" / f"{name}.json") for name in ("known_same", other))
    done = subprocess.run([sys.executable, BENCHMARKS / "cells.py", f"same={files}"], capture_output=True, text=True)
    assert done.returncode == 1 and f"not of the same {key}" in done.stderr


def test_cells_of_several_strategies(tmp_path):
    """Each strategy of the one list against each of the other, with Holm over all of them."""
    file = ROOT / "docs" / "results" / "cells" / "known_same.json"
    command = [sys.executable, BENCHMARKS / "cells.py", f"same={file}", "--of", "split_half,fedavg", "--against"]
    done = subprocess.run([*command, "local,pilot"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.split("\n\n")[1].splitlines()[2:]]
    assert [row[0] for row in rows] == [f"same: {of} − {against}" for of in ("split_half", "fedavg")
                                        for against in ("local", "pilot")]
    scores = {name: np.asarray([seed["score_mean"] for seed in row["seeds"]])
              for name, row in json.loads(file.read_text())["rows"].items()}
    apart = [scores[of] - scores[against] for of in ("split_half", "fedavg") for against in ("local", "pilot")]
    for column, popmean, alternative in ((3, 0.0, "greater"), (4, -0.02, "greater"), (5, 0.02, "less")):
        p = [stats.ttest_1samp(one, popmean, alternative=alternative).pvalue for one in apart]
        ordered = np.argsort(p)
        holm = np.minimum(1, np.maximum.accumulate(np.asarray(p)[ordered] * np.arange(4, 0, -1)))[np.argsort(ordered)]
        assert [float(row[column]) for row in rows] == pytest.approx(holm, abs=6e-4)
    again = json.loads(file.read_text())
    again["rows"]["twin"] = again["rows"]["fedavg"]
    (tmp_path / "again.json").write_text(json.dumps(again))
    command[2] = f"same={tmp_path / 'again.json'}"
    done = subprocess.run([*command, "twin,pilot"], capture_output=True, text=True)
    assert "| same: fedavg − twin | +0.000, no error known | – | – | – | – |" in done.stdout
    done = subprocess.run([*command, "nobody"], capture_output=True, text=True)
    assert done.returncode == 1 and "--against: nobody is in no comparison" in done.stderr


def test_cells_of_some_clients(tmp_path):
    """The mean of two clients' scores, its difference to local training, and a figure."""
    file = ROOT / "docs" / "results" / "cells" / "known_same.json"
    done = subprocess.run([sys.executable, BENCHMARKS / "cells.py", f"same={file}", "--clients", "ocr_0,ocr_1",
                           "--figure", tmp_path / "cells.png"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text())["rows"]
    means = {name: np.mean([[seed["score_by_client"][c] for c in ("ocr_0", "ocr_1")] for seed in rows[name]["seeds"]])
             for name in ("local", "split_half")}
    scores, differences = done.stdout.split("\n\n")
    assert float(scores.splitlines()[2].split("|")[3].split("±")[0]) == pytest.approx(means["local"], abs=6e-4)
    difference = float(differences.splitlines()[2].split("|")[2].split("[")[0])
    assert difference == pytest.approx(means["split_half"] - means["local"], abs=6e-4)
    assert (tmp_path / "cells.png").read_bytes().startswith(b"\x89PNG")
