"""Tests the differences of variants to references, and what the tables say of them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, small_config
from scipy import stats

from pilot_jax.compare import figures, runner, tables
from pilot_jax.compare.difference_table import detail_rows, difference_cell, difference_explanations, references_of
from pilot_jax.compare.differences import check_references, client_scores, differences, references
from pilot_jax.compare.page import comparison_page, read_comparison, write_results
from pilot_jax.compare.statistics import best_factor, edge_warnings, summarise
from pilot_jax.errors import InputError


def row(name: str, scores: np.ndarray, finetuned: np.ndarray | None = None) -> dict:
    """Returns the results of a variant, as `runner.run_variant` does, with `scores` [S, K]."""
    seeds = []
    for number, one in enumerate(scores):
        seeds.append({
            "seed": number, "diverged": False, "score_mean": float(one.mean()),
            "score_by_client": {f"c{k}": float(x) for k, x in enumerate(one)},
            "score_by_task": {"t": float(one.mean())}, "base_captions": None, "effective_neighbors": [1.0],
            "bytes_up": 3_000_000, "bytes_down": 1_000_000})
        if finetuned is not None:
            seeds[-1] |= {"score_finetuned": float(finetuned[number].mean()), "score_finetuned_by_client": {
                f"c{k}": float(x) for k, x in enumerate(finetuned[number])}}
    return {"name": name, "seeds": seeds, "wall_seconds": 1.0, "rate_factor": 1.0}


def diverge(of: dict, number: int) -> None:
    """Makes a seed of a row one that diverged, as `runner._seed_record` writes it."""
    of["seeds"][number] = {"seed": number, "diverged": True, "score_mean": None, "score_by_client": {},
                           "score_by_task": {}, "base_captions": None}


def results_of(rows: dict, against: tuple[str, ...] = (), margin: float = 0.02) -> dict:
    """Returns the results as `runner.compare` does."""
    apart, seeds = differences(rows, against, margin), len(next(iter(rows.values()))["seeds"])
    return {"split": "test", "seeds": seeds, "factors": [], "rates": {}, "margin": margin, "warnings": [],
            "config": {"federation": {"rounds": 1}}, "base": {"score": 0.1, "base_captions": None}, "devices": 1,
            "device": "cpu", "seconds_of_all": 1.0, "seconds_of_tuning": 0.0,
            "variants": [summarise(name, one) | {"rate_factor": 1.0, "differences": apart[name]}
                         for name, one in rows.items()]}


RNG = np.random.default_rng(0)
LOCAL = RNG.uniform(0.4, 0.6, (4, 5))
ROWS = {"local": row("local", LOCAL), "pilot": row("pilot", LOCAL + 0.1 + RNG.normal(0, 0.01, (4, 5))),
        "fedavg": row("fedavg", LOCAL - 0.3 + RNG.normal(0, 0.01, (4, 5)), LOCAL + RNG.normal(0, 0.004, (4, 5)))}


def means(name: str, key: str = "score_mean") -> np.ndarray:
    return np.asarray([seed[key] for seed in ROWS[name]["seeds"]])


def test_signs_intervals_and_p_values_are_scipys():
    found = differences(ROWS)
    assert set(found["fedavg"]) == {"pilot", "local", "fedavg_ft"} and set(found["pilot"]) == {"local", "fedavg_ft"}
    tuned = means("fedavg", "score_finetuned")
    for name, reference, first, second in (
            ("fedavg", "pilot", means("pilot"), means("fedavg")), ("pilot", "local", means("pilot"), means("local")),
            ("pilot", "fedavg_ft", means("pilot"), tuned), ("fedavg", "fedavg_ft", means("fedavg"), tuned)):
        one, expected = found[name][reference], stats.ttest_rel(first, second)
        interval = expected.confidence_interval(0.95)
        assert one["mean"] == pytest.approx((first - second).mean()) and one["unit"] == "seeds"
        assert (one["low"], one["high"], one["p"]) == pytest.approx((interval.low, interval.high, expected.pvalue))


def test_holm_is_over_the_variants_of_a_reference():
    found = differences(ROWS)
    one, other = found["pilot"]["local"], found["fedavg"]["local"]
    small, large = sorted((one, other), key=lambda d: d["p"])
    assert small["p_adjusted"] == pytest.approx(2 * small["p"])
    assert large["p_adjusted"] == pytest.approx(max(large["p"], 2 * small["p"]))
    rows = {"local": ROWS["local"], "pilot": ROWS["pilot"]}
    alone = differences(rows)["pilot"]["local"]
    assert alone["p_adjusted"] == alone["p"]


def test_a_star_needs_the_adjusted_p_value():
    """Twenty variants without any difference in truth: some p is below 0.05, but no adjusted one."""
    rng = np.random.default_rng(7)
    rows = {"pilot": row("pilot", rng.normal(0.5, 0.1, (3, 4)))}
    rows |= {f"v{i}": row(f"v{i}", rng.normal(0.5, 0.1, (3, 4))) for i in range(20)}
    found = [of["pilot"] for name, of in differences(rows).items() if name != "pilot"]
    assert min(d["p"] for d in found) < 0.05 and not any(d["significant"] for d in found)
    assert any(d["low"] > 0 or d["high"] < 0 for d in found)


@pytest.mark.parametrize(("shift", "non_inferior", "equivalent"), [
    (0.0, True, True), (0.1, True, False), (-0.1, False, False), (-0.019, False, False)])
def test_margin(shift, non_inferior, equivalent):
    noise = np.asarray([[-0.002], [0.001], [0.001], [0.0]])
    found = differences({"local": ROWS["local"], "x": row("x", LOCAL + shift + noise)}, margin=0.02)["x"]["local"]
    assert (found["non_inferior"], found["equivalent"]) == (non_inferior, equivalent)
    values = (noise + shift)[:, 0]
    above = stats.ttest_1samp(values, -0.02, alternative="greater").pvalue
    below = stats.ttest_1samp(values, 0.02, alternative="less").pvalue
    assert (found["p_non_inferior"], found["p_equivalent"]) == pytest.approx((above, max(above, below)))
    wide = differences({"local": ROWS["local"], "x": row("x", LOCAL + shift + noise)}, margin=0.5)["x"]["local"]
    assert wide["equivalent"]


def test_of_one_seed_the_interval_is_over_clients():
    rows = {name: one | {"seeds": one["seeds"][:1]} for name, one in ROWS.items()}
    found = differences(rows)["pilot"]["local"]
    ours, theirs = client_scores(rows["pilot"], rows["local"], ("score_mean", "score_by_client"))
    interval = stats.ttest_rel(ours[0], theirs[0]).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    assert found["unit"] == "clients" and found["with_other_clients"] is None
    assert "over the clients of this one seed" in " ".join(difference_explanations(results_of(rows)))
    assert "over the clients of this one seed" not in " ".join(difference_explanations(results_of(ROWS)))


def test_of_one_seed_and_one_client_there_is_no_interval():
    rows = {name: row(name, one) for name, one in (("pilot", LOCAL[:1, :1]), ("local", LOCAL[:1, :1] - 0.25))}
    found = differences(rows)["local"]["pilot"]
    assert found["mean"] == pytest.approx(0.25)
    assert all(found[key] is None for key in found if key not in ("mean", "unit"))
    assert difference_cell(results_of(rows)["variants"][1], "pilot") == "+0.250"


def test_equal_differences_show_nothing():
    """Two seeds whose differences agree, as counts of answers may by chance, give no p value and no mark."""
    rows = {"pilot": row("pilot", LOCAL[:2] + 0.25), "local": row("local", LOCAL[:2]), "x": row("x", LOCAL[:2] * 0.9)}
    found = differences(rows)["local"]["pilot"]
    assert found["mean"] == pytest.approx(0.25) and found["p"] is found["low"] is found["equivalent"] is None
    other = differences(rows)["x"]["pilot"]
    assert other["p_adjusted"] == other["p"]  # Holm's correction is over those that were tested
    assert "their error is unknown" in " ".join(difference_explanations(results_of(rows)))
    assert "their error is unknown" not in " ".join(difference_explanations(results_of(ROWS)))


def test_a_diverged_seed_counts_as_0():
    rows = copy.deepcopy(ROWS)
    diverge(rows["fedavg"], 1)
    found, values = differences(rows)["fedavg"]["local"], means("fedavg") - means("local")
    values[1] = -means("local")[1]
    assert found["mean"] == pytest.approx(values.mean())
    assert found["p"] == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    ours, theirs = client_scores(rows["fedavg"], rows["local"], ("score_mean", "score_by_client"))
    assert ours.shape == theirs.shape == (4, 5) and not ours[1].any() and theirs.all()
    assert found["with_other_clients"]["low"] < found["mean"] < found["with_other_clients"]["high"]
    for number in range(4):
        diverge(rows["fedavg"], number)
    assert differences(rows)["fedavg"]["local"]["mean"] == pytest.approx(-means("local").mean())
    assert "fedavg_ft" not in references(rows)  # no seed has fine-tuned scores


def test_without_scores_of_the_same_clients_there_is_no_interval_over_clients():
    rows = copy.deepcopy(ROWS)
    del rows["local"]["seeds"][2]["score_by_client"]["c1"]  # this client has no samples in this seed
    found = differences(rows)["pilot"]["local"]
    assert found["with_other_clients"] is None and found["low"] is not None
    for seed in rows["local"]["seeds"]:
        seed.pop("score_by_client")
    assert differences(rows)["pilot"]["local"]["with_other_clients"] is None


def test_references():
    assert list(references(ROWS)) == ["pilot", "local", "fedavg_ft"]
    own = ROWS | {"fedavg_ft": row("fedavg_ft", LOCAL)}
    assert references(own)["fedavg_ft"][0] is own["fedavg_ft"]
    assert list(references({"fedavg": row("fedavg", LOCAL)})) == []
    assert differences({"fedavg": row("fedavg", LOCAL)}) == {"fedavg": {}}
    assert list(references(ROWS, ["fedavg"])) == ["fedavg"]
    assert differences(ROWS, ["fedavg"])["pilot"]["fedavg"]["mean"] > 0  # variant − reference
    check_references(["pilot"], list(ROWS))
    with pytest.raises(InputError, match=r"'scaffold' is not compared\. Compared are: local, pilot, fedavg"):
        check_references(["pilot", "scaffold"], list(ROWS))


def test_the_table_has_a_column_for_each_reference_and_explains_its_marks():
    results = results_of(ROWS)
    head, *rows = tables.score_rows(results)
    assert [name for name in head if "[95 %]" in name] == [
        "Pilot − variant [95 %]", "minus local [95 %]", "minus FedAvg + FT [95 %]"]
    assert all(len(one) == len(head) for one in rows)
    cells = {one[0]: dict(zip(head, one, strict=True)) for one in rows}
    assert cells["pilot"]["minus local [95 %]"].endswith("] *") and cells["pilot"]["Pilot − variant [95 %]"] == "–"
    assert cells["local"]["minus FedAvg + FT [95 %]"].endswith("] ≈")
    # MB up + MB down is 4 in each run.
    gain = means("pilot").mean() - means("local").mean()
    assert float(cells["pilot"]["gain per MB"]) == pytest.approx(gain / 4, rel=0.05)
    assert all(part in " ".join(tables.explanations(results)) for part in ("above −0.02", "Holm", "gain per MB"))
    assert "most common answer" not in cells
    guessed = {way: {"score": score, "by_task": {"t": score}} for way, score in (("majority", 0.25), ("question", 0.3))}
    head, *rows = tables.score_rows(results | {"guesses": guessed})
    assert [one[0] for one in rows[-3:]] == ["most common answer", "answer by question", "base model"]
    assert all(len(one) == len(head) for one in rows) and {"0.300"} == {rows[-2][head.index(k)] for k in ("own", "t")}
    assert any("No picture" in line for line in tables.explanations(results | {"guesses": guessed}))
    without = results_of({"pilot": ROWS["pilot"], "fedavg": row("fedavg", LOCAL)})
    head, first, *_ = tables.score_rows(without)
    assert references_of(without) == ["pilot"] and "gain per MB" not in head
    assert float(first[head.index("score per MB")]) == pytest.approx(means("pilot").mean() / 4, rel=0.05)


@pytest.mark.parametrize(("width", "columns"), [(60, 3), (120, 5), (400, 16)])
def test_a_terminal_shows_the_columns_that_fit(width, columns):
    results = results_of(ROWS | {"pilot-" + 20 * "x": ROWS["pilot"]})
    found = tables.fitting_rows(results, width)
    assert len(found[0]) == columns and found[0][:2] == ["", "own"]
    assert any(title.startswith("Pilot − variant") for title in found[0])
    assert len(found) == 1 + 4 + 1
    breaks = any("\n" in cell for cells in found for cell in cells)
    assert breaks == (width < 150)


def rate(**scores: float) -> dict:
    """Returns what is known of a strategy's learning rates; x2=0.1 is the score of the factor 2."""
    validation = {name[1:].replace("_", "."): score for name, score in scores.items()}
    return {"factor": best_factor(validation), "validation": validation}


def test_edge_warnings():
    rates = {"pilot": rate(x0_1=0.1, x0_3=0.2, x0_6=0.3), "fedavg": rate(x0_1=0.2, x0_3=0.2, x0_6=0.1),
             "fedprox": rate(x0_1=0.1, x0_3=0.2, x0_6=0.1), "local": rate(x1=0.5)}
    assert edge_warnings(rates) == [
        "pilot: learning rates × 0.6, its best, are the largest of those tried. Better ones may lie beyond: add 1.2 to "
        "--rates.",
        "fedavg: learning rates × 0.1, its best, are the smallest of those tried. Better ones may lie beyond: add "
        "0.0333 to --rates."]
    assert edge_warnings({}) == []


def test_a_strategy_goes_on_beyond_the_grid(tmp_path, monkeypatch):
    """Up to three factors beyond the last, as long as each is the best so far; what is known is not tried again."""
    tried = []

    def tune(field, variant, factors, config, progress):
        tried.append(tuple(factors))
        best = {"far": 100.0, "near": 4.5, "inside": 1.5, "low": 0.3}[variant.name]
        validation = {f"{factor:g}": -abs(np.log(factor / best)) for factor in factors}
        return {"validation": validation, "factor": best_factor(validation)}

    monkeypatch.setattr(runner, "tune", tune)
    monkeypatch.setattr(runner.Comparison, "_field", lambda self, kind: None)
    comparison = runner.Comparison(small_config(), runner.Options(1, (1.0, 1.5, 2.0)), tmp_path, print)
    found = {name: comparison.rates(name)["factor"] for name in ("inside", "near", "far", "low")}
    assert found == {"inside": 1.5, "near": 4.75, "far": 4.75, "low": 0.297}
    first = (1.0, 1.5, 2.0)
    up, down = [(2.67,), (3.56,), (4.75,)], [(0.667,), (0.445,), (0.297,)]
    assert tried == [first, first, *up, first, *up, first, *down]
    comparison.rates("far")
    assert len(tried) == 13


def test_the_page_and_the_files_have_all_of_it(tmp_path):
    results = results_of(ROWS) | {"warnings": ["rates × 0.6 <is> the largest."]}
    write_results(results, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "Warning: rates × 0.6" in text and "Every difference" in text and "| minus local [95 %] |" in text
    read = read_comparison(tmp_path)
    assert read["variants"] == json.loads(json.dumps(results["variants"]))
    page = comparison_page(read)
    assert {"scores", "differences", "differences-1", "differences-2", "traffic"} == set(page.svgs)
    assert "rates × 0.6 &lt;is&gt; the largest." in page.html and "minus FedAvg + FT [95 %]" in page.html
    head, *rows = detail_rows(results)
    assert len(rows) == 2 + 2 + 3 and all(len(one) == len(head) for one in rows)
    assert "95 %: further seeds and clients" in page.html
    read["variants"][0]["differences"]["pilot"]["p"] = "<b>"
    (tmp_path / "results.json").write_text(json.dumps(read))
    with pytest.raises(InputError, match=r"results\.json"):
        read_comparison(tmp_path)


@pytest.mark.filterwarnings("error")
def test_a_figure_of_one_variant_has_room():
    """matplotlib warns where a figure is too small for what it shows."""
    results = json.loads((ROOT / "docs" / "results" / "cells" / "known_own.json").read_text())
    assert figures.png(figures.overview({**results, "variants": results["variants"][:1]}))


def test_long_names_leave_room_for_the_figures():
    """They are whole on the page, and shortened in the PNG file."""
    name = "fedavg+train.lr_connector=0.0001+train.lr_lora_stage1=0.0005+train.lr_lora_stage2=0.0003"
    results = results_of({"pilot": ROWS["pilot"], name: row(name, LOCAL)}) | {"name": "long"}
    assert name in comparison_page(results).html
    assert figures.label({"name": name}) == "fedavg+train.lr…lora_stage2=0.0003" and figures.label({"name": "a"}) == "a"


OLD = [path for path in sorted((ROOT / "docs" / "results").glob("*.json")) if "rows" in json.loads(path.read_text())]


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_results_of_earlier_versions_are_read(path: Path):
    """They have the difference to Pilot alone, without p values, and the new columns that need none."""
    results = read_comparison(path)
    assert references_of(results) in (["pilot"], []) and detail_rows(results) == []
    head, *rows = tables.score_rows(results)
    assert "gain per MB" in head or "score per MB" in head
    assert len(rows) == len(results["variants"]) + 1
    assert "excludes 0" in " ".join(difference_explanations(results)) or references_of(results) == []
    mixed = results | {"margin": 0.02}  # nothing writes such a file, but `report` reads files of others
    assert tables.explanations(mixed) and len(detail_rows(mixed)) <= 1
