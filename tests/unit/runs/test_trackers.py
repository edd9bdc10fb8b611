"""Tests that TensorBoard, Weights & Biases and MLflow get the numbers of metrics.jsonl, each from its own library."""

from __future__ import annotations

import json
import struct

import pytest
from conftest import small_config
from tensorboardX.proto.event_pb2 import Event

from pilot_jax.config import SystemConfig
from pilot_jax.errors import InputError
from pilot_jax.federation.observer import RunObserver
from pilot_jax.runs import simulate, trackers


class Notes(RunObserver):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


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


def wandb_records(folder):
    """Yields the records of an offline run, whose file has blocks of 32 KiB after a header of 7 bytes: each part of a
    record follows a checksum (4 bytes), its length (2) and whether it is whole (1), first, middle or last."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


def mlflow_history(client, run, names):
    return {(name, point.step): point.value for name in names for point in client.get_metric_history(run, name)}


@pytest.fixture
def local_services(tmp_path, monkeypatch):
    """W&B without a network, and MLflow in a folder; returns MLflow's client."""
    from mlflow import MlflowClient

    for name, value in {"WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"file://{tmp_path}/mlruns",
                        "MLFLOW_ALLOW_FILE_STORE": "true"}.items():
        monkeypatch.setenv(name, value)
    return MlflowClient(tracking_uri=f"file://{tmp_path}/mlruns")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_losses_and_scores_of_a_run(tmp_path, local_services):
    config = small_config(eval={"every": 1}, system={"tensorboard": True, "wandb": "federated", "mlflow": "Federated"})
    run = simulate.simulate(config, out=tmp_path / "run")
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

    (experiment,) = [e for e in local_services.search_experiments() if e.name == "Federated"]
    (at_mlflow,) = local_services.search_runs([experiment.experiment_id])
    history = mlflow_history(local_services, at_mlflow.info.run_id, {name for name, _ in wanted})
    assert history == pytest.approx(wanted) and at_mlflow.info.status == "FINISHED"
    assert at_mlflow.data.params["strategy.name"] == "pilot" and at_mlflow.info.run_name == "run"
    client = run.summary["clients"][0]
    assert at_mlflow.data.metrics[f"score_by_client/{client}"] == run.summary["score_by_client"][client]

    sent, final, config_sent = {}, {}, {}
    for record in wandb_records(tmp_path / "run"):
        items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        axis = "round" if "round" in items else "client_steps"
        sent |= {(name, items[axis]): value for name, value in items.items() if "/" in name}
        final |= {"/".join(item.nested_key) or item.key: json.loads(item.value_json)
                  for item in record.summary.update}
        config_sent |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    assert {key: sent[key] for key in wanted} == pytest.approx(wanted)
    assert final[f"score_by_client/{client}"] == run.summary["score_by_client"][client]
    assert config_sent["strategy"]["name"] == "pilot"


RECORDS = [{"round": 1, "client": "a", "step": 3, "loss": 2.0}, {"round": 1, "client": "a", "step": 3, "loss": 1.0}]


def test_a_run_that_goes_on_has_one_line(tmp_path):
    files = trackers.EventFiles(tmp_path / "tensorboard")
    for record in (*RECORDS, {"round": 1, "client": "a", "step": 3, "loss": 9.0}):  # the last is in no snapshot
        files.client_trained(record)
    files.close()
    files = trackers.EventFiles(tmp_path / "tensorboard", RECORDS)
    files.client_trained({"round": 2, "client": "a", "step": 3, "loss": 0.5})
    files.close()
    assert scalars(tmp_path / "tensorboard") == {("loss/a", 3): 2.0, ("loss/a", 6): 1.0, ("loss/a", 9): 0.5}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_that_goes_on_is_the_same_at_the_service(tmp_path, local_services):
    (tmp_path / "config.yaml").write_text("train: {batch_size: 8}\n")
    system = SystemConfig(mlflow="Federated")
    (one,) = trackers.open_services(system, tmp_path, [], Notes())
    for record in RECORDS:
        one.client_trained(record)
    one.close()
    assert local_services.get_run(one.identity).info.status == "FAILED"
    (two,) = trackers.open_services(system, tmp_path, RECORDS, Notes())
    two.client_trained({"round": 2, "client": "a", "step": 3, "loss": 0.5})
    two.run_ended({"score_by_task": {"vqa": 0.25}, "strategy": "pilot"})
    two.close()
    run = local_services.get_run(one.identity)
    assert two.identity == one.identity and run.info.status == "FINISHED"
    assert run.data.params == {"train.batch_size": "8"} and run.data.metrics["score_by_task/vqa"] == 0.25
    assert mlflow_history(local_services, one.identity, ["loss/a"]) == {
        ("loss/a", 3): 2.0, ("loss/a", 6): 1.0, ("loss/a", 9): 0.5}


def test_a_service_that_fails_does_not_end_the_run(tmp_path, local_services):
    (tmp_path / "config.yaml").write_text("train: {batch_size: 8}\n")
    notes = Notes()
    (one,) = trackers.open_services(SystemConfig(mlflow="Federated"), tmp_path, [], notes)
    local_services.delete_run(one.identity)  # a deleted run takes no values
    for record in RECORDS:
        one.client_trained(record)
    one.close()
    assert len(notes.texts) == 1 and notes.texts[0].startswith("warning: system.mlflow: ")
    assert notes.texts[0].endswith("The run goes on without it; its folder has all numbers.")


def test_a_service_out_of_reach_is_said_before_training(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("train: {batch_size: 8}\n")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://127.0.0.1")
    with pytest.raises(InputError, match=r"system\.mlflow: 'Federated' cannot be reached .*Set MLFLOW_TRACKING_URI"):
        trackers.open_services(SystemConfig(mlflow="Federated"), tmp_path, [], Notes())


@pytest.mark.parametrize("key", ["tensorboard", "wandb", "mlflow"])
def test_without_the_extra(tmp_path, monkeypatch, key):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"system\.{key}: needs {trackers.TOOLS[key][1]}.*Run: pip install"):
        simulate.simulate(small_config(system={key: True if key == "tensorboard" else "x"}), out=tmp_path / "run")
