"""Tests of benchmarks/accelerator.py: it is rehearsed whole at toy size, and what fails takes nothing else with it."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "accelerator.py"
WORKER = """
import json, os, sys, time
results = open(sys.argv[1], "a")
for number, case in json.load(sys.stdin):
    results.write(json.dumps({"started": number}) + "\\n"), results.flush()
    if case["batch"] == 2:
        os._exit(9)
    if case["batch"] == 3:
        time.sleep(600)
    results.write(json.dumps({"case": number, "tokens_per_second": 5.0}) + "\\n"), results.flush()
"""


@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import accelerator

    return accelerator


@pytest.mark.long
def test_the_whole_at_toy_size(tmp_path):
    """Every case of every part has its numbers, but those of cuDNN, which say why not; all is in both files."""
    done = subprocess.run([sys.executable, SCRIPT, "--toy", "--json", tmp_path / "out.json"], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    out, table = json.loads((tmp_path / "out.json").read_text()), (tmp_path / "out.md").read_text()
    failed = [row for row in out["rows"] if row["status"] != "measured"]
    assert all(row.get("attention") == "cudnn" and "needs an NVIDIA GPU" in row["status"] for row in failed), failed
    steps = [row for row in out["rows"] if row["status"] == "measured" and row["part"] == "step"]
    assert all(row["of_ceiling"] > 0 and row["compiled_bytes"] > 0 and row["planned_bytes"] > 0 for row in steps)
    assert {row["base"] for row in steps if "base" in row} == {"int8", "nf4"}
    assert {row["group"] for row in out["rows"]} == {line[2:].split("**")[0] for line in table.splitlines()
                                                     if line.startswith("**")}
    assert all(row["what"] in table for row in out["rows"])
    assert [claim["holds"] for claim in out["claims"]] == [None] * 3  # claims are about the 7B shape


def test_a_crash_or_a_hang_costs_one_case(tmp_path, accelerator):
    groups = [[{"group": "claim", "part": "step", "clients": 1, "batch": n} for n in (1, 2, 3, 4)]]
    record = accelerator.Record(tmp_path / "out.json", groups, toy=False)
    accelerator.supervise([sys.executable, str(worker(tmp_path))], list(enumerate(groups[0])),
                          record, time.time() + 60, limit=2)
    one, crashed, hung, last = (row["status"] for row in json.loads((tmp_path / "out.json").read_text())["rows"])
    assert one == last == "measured"
    assert crashed == "failed: the process ended with code 9" and hung.startswith("failed: stopped after")


def worker(folder):
    path = folder / "worker.py"
    path.write_text(WORKER, encoding="utf-8")
    return path


def test_what_does_not_fit_the_time_is_said(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--minutes", "0", "--json", tmp_path / "out.json"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "no time was left" in (tmp_path / "out.md").read_text()


def test_what_was_measured_is_kept(tmp_path, accelerator):
    """With --resume, rows of the same cases are taken over, and no others."""
    groups = [[{"group": "claim", "part": "step", "clients": n, "batch": 1} for n in (1, 2)]]
    accelerator.Record(tmp_path / "out.json", groups, toy=False).put(0, {"tokens_per_second": 7.0})
    more = [[groups[0][1], groups[0][0], {**groups[0][0], "batch": 2}]]
    record = accelerator.Record(tmp_path / "out.json", more, toy=False)
    record.keep()
    assert [row["status"] for row in record.rows] == ["not reached", "measured", "not reached"]
    assert record.rows[1]["tokens_per_second"] == 7.0


def test_the_claims_are_judged(tmp_path, accelerator):
    """By their definitions: 9 adapters' tokens/s, their share of the ceiling, and what one adapter is faster by."""
    record = accelerator.Record(tmp_path / "out.json", accelerator.cases(toy=False), toy=False)
    number = {(row["group"], row.get("clients")): i for i, row in enumerate(record.rows)}
    record.put(number["claim", 9], {"tokens_per_second": 18_000.0, "flops_per_second": 4e14})
    assert [claim["holds"] for claim in record.claims()] == [True, None, None]
    record.put(number["ceiling", None], {"flops_per_second": 7e14})
    record.put(number["claim", 1], {"tokens_per_second": 19_000.0, "flops_per_second": 4.2e14})
    measured = [claim["measured"] for claim in record.claims()]
    assert measured == pytest.approx([18_000, 4 / 7, 19 / 18 - 1])
    assert [claim["holds"] for claim in record.claims()] == [True, True, False]
