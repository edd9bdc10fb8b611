"""Tests that the TensorBoard event files have the same numbers as metrics.jsonl."""

from __future__ import annotations

import json
import struct

import pytest
from conftest import small_config
from tensorboardX.proto.event_pb2 import Event

from pilot_jax.errors import InputError
from pilot_jax.runs import simulate, tensorboard


def scalars(folder):
    """Returns {(tag, step): value} from the only event file in a folder.

    A record of that file is its length, a checksum, the message, and another checksum."""
    (file,) = folder.glob("events.*")
    data, at, found = file.read_bytes(), 0, {}
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12:at + 12 + length])
        found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        at += 12 + length + 4
    return found


@pytest.mark.slow
def test_losses_and_scores_of_a_run(tmp_path):
    simulate.simulate(small_config(eval={"every": 1}, system={"tensorboard": True}), out=tmp_path / "run")
    found, steps = scalars(tmp_path / "run" / "tensorboard"), 0
    wanted = {}
    for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        if "score" in line:
            wanted[f"validation/{line['client']}", line["round"]] = line["score"]
        elif "client" in line:
            steps += line["step"]
            wanted[f"loss/{line['client']}", steps] = line["loss"]
        else:
            wanted["phase/loss", steps] = line["loss"]
    assert len(wanted) == 9 + 2 * 9 + 2 and {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)


def test_a_run_that_goes_on_has_one_line(tmp_path):
    records = [{"round": 1, "client": "a", "step": 3, "loss": 2.0}, {"round": 1, "client": "a", "step": 3, "loss": 1.0}]
    files = tensorboard.EventFiles(tmp_path / "tensorboard")
    for record in (*records, {"round": 1, "client": "a", "step": 3, "loss": 9.0}):  # the last is in no snapshot
        files.client_trained(record)
    files.close()
    files = tensorboard.EventFiles(tmp_path / "tensorboard", records)
    files.client_trained({"round": 2, "client": "a", "step": 3, "loss": 0.5})
    files.close()
    assert scalars(tmp_path / "tensorboard") == {("loss/a", 3): 2.0, ("loss/a", 6): 1.0, ("loss/a", 9): 0.5}


def test_without_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs tensorboardX.*Run: pip install tensorboardX"):
        simulate.simulate(small_config(system={"tensorboard": True}), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
