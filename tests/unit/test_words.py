"""Tests that what is printed is neither nonsense nor bad grammar: plurals, rates, small numbers, missing scores."""

from __future__ import annotations

import ast
import itertools
import re

import pytest
import yaml
from conftest import ROOT

from pilot_jax import words
from pilot_jax.cli.tables import print_matrix, print_plan, print_scores
from pilot_jax.compare.statistics import summarise
from pilot_jax.planning.forecast import forecast_line
from pilot_jax.runs.summary import speed

NOUNS = ("client|task|round|step|sample|device|error|file|figure|upload|warning|neighbour|token|prompt|process|image|"
         "run|seed|variant|phase|character|question|answer|line|row|picture|second|minute|model")
ALLOWED = {  # expressions before a plural that are no count, or always more than one
    "{split}", "{samples[0].split}", "{samples[0].split} ", "{mesh.devices}", "{wanted}", "{len(mixing)}", "{length:,}",
    "{len(models)}", "{len(run.updates):,}", "{len(ids)}", "{size}", "{len(item.input_ids)}", "{num_image_tokens}",
    "{len(text)}", "{len(value)}", "{max(len(found), len(parts))}", "{total}", "{self.count}"}


def test_every_count_has_its_plural():
    """No f-string has an expression right before a plural noun, except through `counted`."""
    wrong = []
    for path in sorted((ROOT / "pilot_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            for value, text in itertools.pairwise(parts):
                if (isinstance(value, ast.FormattedValue) and isinstance(text, ast.Constant)
                        and re.match(rf" ({NOUNS})s\b", text.value)):
                    shown = re.sub(r"^f['\"]|['\"]$", "", ast.unparse(ast.JoinedStr([value])))
                    if shown not in ALLOWED:
                        wrong.append(f"{path.name}:{node.lineno}: {shown}{text.value[:20]}")
    assert not wrong, "\n".join(wrong)


def test_counts_agree_with_their_verbs():
    assert words.agree(1, "sample", "has", "have") == "1 sample has"
    assert words.agree(2, "sample", "has", "have") == "2 samples have"
    assert words.counted(1, "file or snapshot", "files and snapshots") == "1 file or snapshot"


@pytest.mark.parametrize(("value", "text"), [(0, "0 "), (950, "950 "), (1234, "1.23 k"), (999_600, "1 M"),
                                             (9.3e12, "9.3 T"), (2e18, "2,000 P")])
def test_prefixes(value, text):
    assert words.scaled(value) == text


def test_a_rate_needs_a_time():
    """Twenty steps in a nanosecond that is left of ten seconds are no speed."""
    assert speed(20, 1e-9, 10.0) is None and speed(20, -0.5, 10.0) is None and speed(0, 0.0, 0.0) is None
    assert speed(20, 5.0, 10.0) == 4.0


def summary(**changes):
    return {"score_by_client": {"a": 0.5}, "score_base_by_client": {"a": 0.25}, "score_by_task": {"t": 0.5, "u": None},
            "score_base_by_task": {"t": 0.25, "u": None}, "score_mean": 0.5, "score_base": 0.25, "strategy": "fedavg",
            "clients": ["a", "b"], "tasks": ["t", "u"], "task_by_client": {"a": "t", "b": "u"}, "client_steps": 1,
            "client_steps_per_second": None, "bytes_up": 1234, "bytes_down": 0, "wall_seconds": 0.3,
            "compile_seconds": 0.0, "peak_memory_bytes": 1.2e9, "memory_bytes": {"base": 0, "tokens": 4096},
            "quarantined": 1, "epsilon": None} | changes


def test_a_tiny_run_is_printed_as_it_is(capsys):
    print_scores(summary())
    out = capsys.readouterr().out
    assert "1 client step; 1.23 kB up, 0 B down; 0.3 s with evaluation, of which compiling 0.0 s" in out
    assert "base 0 B, tokens 4.1 kB" in out and "1 upload was refused" in out and "no test data" in out
    rates = {"round_1": 1, "later_rounds": 1}
    print_plan({"clients": 1, "tasks": 1, "rounds": 1, "devices": 1, "longest_sequence": 1, "image_tokens": 0,
                "assumed": "", "memory_per_device": {"plain": {"total": 3e6}}, "client_steps": rates,
                "flops": {"round_1": 2.5e6, "later_rounds": 0}, "bytes_up": {"round_1": 800, "later_rounds": 800},
                "bytes_down": rates, "bytes_between_devices_per_step": {"plain": {"weights": 0}},
                "server": {"flops": 10, "bytes": 10}, "parameters": {"base": 1}})
    out = capsys.readouterr().out
    assert "1 client, 1 task, 1 round, 1 device" in out and "2.5 MFLOP" in out and "800 B" in out
    assert not re.search(r"\b1 (clients|tasks|rounds|devices|tokens)", out) and "0 TFLOP" not in out
    assert forecast_line({"flops": 2.5e6, "seconds": 0.004, "bytes": 3e6}) == (
        "training needs 2.5 MFLOP, which take at least 4 ms on this machine (compilation not included), and 3 MB on "
        "each device")


def test_a_client_without_data_has_no_column_of_scores(capsys):
    print_matrix({"split": "test", "clients": ["a", "b"], "tasks": ["t", "u"], "base_captions": None,
                  "scores": [[0.5, None], [0.25, None]], "by_task": {"a": {"t": 0.5, "u": None},
                                                                     "b": {"t": 0.25, "u": None}}})
    out = capsys.readouterr().out
    assert "–" in out and "b: no test data, so no model has a score there." in out
    row = {"wall_seconds": 1.0, "seeds": [{"diverged": False, "score_mean": 0.5, "score_by_task": {"t": 0.5, "u": None},
                                           "base_captions": None, "effective_neighbors": [1.0]}]}
    assert summarise("x", row)["by_task"] == {"t": 0.5}


@pytest.mark.parametrize(("text", "parts"), [
    ("", [""]), ("a, b", ["a", "b"]), ("[1, 2],[3]", ["[1, 2]", "[3]"]),
    ("{a: [1, 2], b: 3}, x", ["{a: [1, 2], b: 3}", "x"]),
    ("a],b", ["a]", "b"]), ("[a,b", ["[a,b"])])
def test_lists_are_separated_outside_of_brackets(text, parts):
    assert words.separated(text) == parts


@pytest.mark.parametrize("value", [
    "", "plain", "a: b # c", "'\"\\", "\U0001f600 \U00010000\U0010ffff é \u2028\x7f\x85\ufeff", r"\ud83d\ude00",
    "\n\t\0", "yes", 3, None, [True, 1.5e-7, "1e3"], {"\U0001f3e5 a": {"lr": 0.1}, "": []}])
def test_json_values_are_the_same_in_yaml(value):
    text = words.yaml_text(value)
    assert yaml.safe_load(text) == value and text.isascii() and "\n" not in text
