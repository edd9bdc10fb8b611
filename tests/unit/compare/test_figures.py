"""The figures of a comparison: what they show of many tasks, of odd names, and of seeds that diverged."""

import copy

import numpy as np
import pytest

from pilot_jax.compare import cards, figures, tables
from tests.unit.compare.test_differences import LOCAL, ROWS, diverge, results_of, row


@pytest.mark.filterwarnings("error")
def test_every_task_is_in_the_legend():
    """Also the fourteenth, and one whose name begins with an underscore, which matplotlib leaves out by itself."""
    tasks = [f"task {n:02}" for n in range(13)] + ["_hidden", "costs $1 or $2"]
    results = results_of({"local": row("local", LOCAL)})
    results["variants"][0]["by_task"] = dict.fromkeys(tasks, 0.5)
    figure = figures.overview(results)
    shown = [text.get_text().strip() for text in figure.legends[0].get_texts()]
    assert sorted(shown) == sorted([*tasks, "base model"])
    assert figures.png(figure)


def test_gains_leave_out_seeds_that_diverged():
    rows = copy.deepcopy({name: ROWS[name] for name in ("local", "pilot")})
    diverge(rows["pilot"], 0)
    results = results_of(rows) | {"rows": rows}
    gains = cards.client_gains(results, "pilot")
    scores = {name: np.asarray([list(s["score_by_client"].values()) for s in rows[name]["seeds"][1:]]) for name in rows}
    np.testing.assert_allclose(np.stack(list(gains.values()), 1), scores["pilot"] - scores["local"])
    assert "Mean over 3 seeds with its standard error." in cards.gain_card(results).about
    for number in (1, 2, 3):
        diverge(rows["local"], number)
    assert cards.client_gains(results, "pilot") is None


def test_a_name_with_a_bar_is_one_cell():
    results = results_of({"local": row("local", LOCAL)})
    results["variants"][0]["by_task"] = {"a|b": 0.5}
    head, rule, *lines = tables.table(results).split("\n")
    assert "| a\\|b |" in head and all(line.replace("\\|", "").count("|") == rule.count("|") for line in (head, *lines))
