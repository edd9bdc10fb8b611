"""docs/run-folder.md names every file, field, array and shape of a run, and none that does not exist."""

from __future__ import annotations

import json
import re

import jax
import numpy as np
import pytest
from conftest import ROOT, small_config

import pilot_jax
from pilot_jax.config import load_config
from pilot_jax.federation.strategies.pilot import Pilot
from pilot_jax.runs.progress import ProgressDisplay

PAGE = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")
# Fields that a run without `combine: exact`, refused uploads and privacy does not have.
SOMETIMES = {"residual_lost", "fault", "epsilon"}


def rows(title: str) -> list[list[str]]:
    """The cells of the first table after a heading, or after a paragraph in bold letters."""
    after = PAGE[re.search(rf"^(##+ |\*\*){re.escape(title)}", PAGE, re.M).start():]
    found = re.search(r"^(\|.*\n)+", after, re.M)[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in found]


def names(title: str) -> set[str]:
    """The names in backticks in the first column of such a table."""
    return {name for cells in rows(title) for name in re.findall(r"`([^`]+)`", cells[0])}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(run directory, what `--progress json` printed, a phase's Cohort) of a small federation."""
    folder, cohorts, printed = tmp_path_factory.mktemp("run") / "run", [], []

    class Watched(Pilot):
        def aggregate(self, cohort, server):
            cohorts.append(cohort)
            return super().aggregate(cohort, server)

    class Display(ProgressDisplay):
        def _emit(self, kind, event, text):
            printed.append(json.loads(json.dumps({"kind": kind, **event})))

    config = small_config(eval={"every": 1, "max_new_tokens": 1})
    pilot_jax.simulate(config, strategy=Watched(config.strategy), out=folder, observers=[Display(folder, mode="json")])
    return folder, printed, cohorts[0]


@pytest.mark.slow
def test_every_file_is_on_the_page(written):
    documented = names("The run directory")
    for file in (file for file in written[0].rglob("*") if file.is_file()):
        path = file.relative_to(written[0]).as_posix()
        path = re.sub(r"clients/[^/]+", "clients/<client>", path)
        path = re.sub(r"round_\d{4}_stage\d", "round_0001_stage1", path)
        assert any(path == known or (known.endswith("/") and path.startswith(known)) for known in documented), path
    assert load_config(written[0] / "config.yaml") is not None


@pytest.mark.slow
def test_every_field_of_metrics_jsonl_is_on_the_page(written):
    found = {"client": set(), "phase": set(), "score": set()}
    for line in (written[0] / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found["score" if "score" in record else "client" if "client" in record else "phase"] |= set(record)
    assert names("The local training of one client") - SOMETIMES == found["client"]
    assert names("The end of a phase") - SOMETIMES == found["phase"]
    assert names("A score on held-out data") - {"validation"} == found["score"]


@pytest.mark.long
def test_every_array_of_mixing_is_on_the_page_with_its_shape(written):
    documented = {re.findall(r"`([^`]+)`", cells[0])[0]: cells[1] for cells in rows("`mixing/*.npz`")}
    file = written[0] / "mixing" / "round_0001_stage1.npz"
    with np.load(file) as arrays:
        size = len(arrays["client_ids"])
        others = {"ratio", "ratio_projector", "weights_projector", "credit"}  # of other strategies
        assert documented.keys() == set(arrays) | others
        for name, shape in ((name, shape) for name, shape in documented.items() if name in arrays):
            assert arrays[name].ndim == shape.split("]")[0].count("S") and set(arrays[name].shape) == {size}
            assert arrays[name].dtype == np.float32 or "text" in shape
    example = re.search(r"```python\n(.*?)```", PAGE, re.S)[1]
    exec(example.replace("runs/quickstart/mixing/round_0001_stage1.npz", str(file)), {"print": lambda *_: None})


@pytest.mark.slow
def test_every_field_of_summary_json_is_on_the_page(written):
    fields = set(json.loads((written[0] / "summary.json").read_text(encoding="utf-8")))
    assert names("`summary.json`") == fields | {"deployed"}  # of a server's run alone


@pytest.mark.slow
def test_every_progress_event_is_on_the_page(written):
    documented = {re.findall(r"`([^`]+)`", cells[0])[0]: cells[1] for cells in rows("Progress events")}
    assert documented.keys() == {event["kind"] for event in written[1]} | {"summary"}  # which the command prints
    for event in written[1]:
        allowed = set(re.findall(r"`(\w+)`", documented[event["kind"]])) | {"kind"}
        if event["kind"] == "phase":
            allowed |= {name for name in names("The end of a phase") if not name.endswith("_by_subtree")}
        assert set(event) <= allowed, event


@pytest.mark.slow
def test_a_cohort_has_the_shapes_on_the_page(written):
    cohort, documented = written[2], names("What a strategy receives")
    assert documented == {*vars(cohort), "ratio"}  # a property
    size, lora = len(cohort), cohort.uploads["text_adapter"]["layers"]
    assert all(len(getattr(cohort, name)) == size for name in ("sizes", "tasks", "ids", "new"))
    assert set(cohort.uploads) == {"text_adapter", "task"}
    assert set(lora) == {"q", "k", "v", "o", "gate", "up", "down"}
    for pair in lora.values():
        assert pair["a"].shape[:3] == (size, pair["b"].shape[1], 4) and pair["b"].shape[0::3] == (size, 4)
    first, second = (cohort.uploads["task"][f"linear_{i}"]["kernel"].shape for i in (1, 2))
    assert first[0] == second[0] == size and first[2] == second[1] == second[2]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(cohort.uploads))
