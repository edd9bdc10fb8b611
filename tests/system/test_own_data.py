"""Tests with a checkpoint and photographs of the user's own: all forms of data sets, a whole run, and broken data."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from conftest import ROOT, write_checkpoint
from PIL import Image

import pilot_jax
from pilot_jax.config import parse_config
from pilot_jax.data.check import check_data
from pilot_jax.data.images import pad_to_square, pixel_values, read_image
from pilot_jax.data.llava.reading import read_samples

CONFIG = ROOT / "configs" / "llava15_7b.yaml"
CLIENTS = {"north": "vqa", "south": "vqa", "clinic": "caption", "museum": "caption"}


def photograph(rng, width, height):
    """Returns an image of smooth random colours with noise, like a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8)).resize((width, height), Image.BICUBIC)
    return Image.fromarray((np.asarray(coarse) * 0.9 + rng.integers(0, 25, (height, width, 3))).astype(np.uint8))


def photo_entries(folder, per_client=5):
    """Returns entries of LLaVA JSON and writes their images, JPEG and PNG of many sizes, into `folder`/images."""
    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    entries = []
    for client, task in CLIENTS.items():
        for i in range(per_client):
            name = f"{client}_{i}.{'jpg' if i % 2 else 'png'}"
            photograph(rng, int(rng.integers(20, 90)), int(rng.integers(20, 90))).save(folder / "images" / name)
            asked = "<image>\nwhat is shown?" if task == "vqa" else "describe it.\n<image>"
            entries.append({"id": f"{client}-{i}", "image": name, "task": task, "client": client,
                            "split": "test" if i == 0 else "train",
                            "conversations": [{"from": "human", "value": asked},
                                              {"from": "gpt", "value": f"the {client} number {i}"}]})
    return entries


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "llava"
    write_checkpoint(folder, text={"max_position_embeddings": 512})
    return folder


@pytest.fixture
def photos(tmp_path):
    entries = photo_entries(tmp_path / "data")
    (tmp_path / "data" / "all.json").write_text(json.dumps(entries))
    return tmp_path / "data"


@pytest.mark.slow
def test_check_run_evaluate_ask_and_export(call, checkpoint, photos, tmp_path):
    """The README's commands for a checkpoint and data of the reader's own, one after another."""
    code, out, _ = call("data", "check", photos, "--model", checkpoint)
    assert code == 0 and "20 samples, all readable" in out and "tokens" in out
    settings = [f"model.path={checkpoint}", f"data.path={photos}", "data.partition=given", "federation.clients=null",
                "federation.rounds=1", "federation.local_steps=2", "train.batch_size=2", "eval.max_new_tokens=4",
                "system.unroll=1", "eval.metrics={caption: rouge_l, vqa: vqa}"]
    config = [CONFIG, *(part for s in settings for part in ("--set", s))]
    code, out, err = call("plan", *config)
    assert code == 0 and "4 clients, 2 tasks" in out, err
    code, out, err = call("run", *config, "--out", tmp_path / "run")
    assert code == 0, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["clients"] == sorted(CLIENTS) and summary["client_steps"] == 4 * 2 * 2
    code, out, _ = call("evaluate", tmp_path / "run", "--json")
    assert code == 0
    assert json.loads(out)["score_by_client"] == pytest.approx(summary["score_by_client"])
    picture = photos / "images" / "north_1.jpg"
    code, out, err = call("generate", tmp_path / "run", "--client", "north", "--image", picture, "--prompt",
                          "what is shown?", "--max-new-tokens", "4", "--temperature", "0.8", "--top-p", "0.9")
    assert code == 0, err
    code, out, err = call("generate", tmp_path / "run", "--client", "north", "--prompt", "hello", "--max-new-tokens", 2)
    assert code == 0, err
    code, out, err = call("export", tmp_path / "run", "--client", "north", "--out", tmp_path / "north")
    assert code == 0, err
    assert {f.name for f in (tmp_path / "north").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "connector.safetensors", "pilot_jax.json", "README.md"}
    code, _, err = call("export", tmp_path / "run", "--client", "north", "--merged", tmp_path / "x")
    assert code == 2 and "pilot trains visual adapters" in err and "pilot_jax.torch" in err
    for wrong in ((), ("--out", "x", "--merged", "y"), ("--merged", "y", "--rank", 1)):
        code, _, err = call("export", tmp_path / "run", "--client", "north", *wrong)
        assert code == 2 and err.startswith(("Error: --out, --merged", "Error: --rank")), err
    code, _, err = call("export", tmp_path / "run", "--client", "nobody", "--out", tmp_path / "x")
    assert code == 2 and "nobody" in err and "north" in err


def lines(entries):
    return "\n".join(json.dumps(e) for e in entries)


def without(entry, *keys):
    return {k: v for k, v in entry.items() if k not in keys}


def write_form(folder, entries, form):
    if form == "one list":
        (folder / "all.json").write_text(json.dumps(entries))
    elif form == "a file per task":
        for task in ("vqa", "caption"):
            (folder / f"{task}.jsonl").write_text(lines(without(e, "task") for e in entries if e["task"] == task))
    elif form == "a file per client":
        for client in CLIENTS:
            (folder / f"{client}.json").write_text(
                json.dumps([without(e, "client") for e in entries if e["client"] == client]))
    elif form == "a folder per task, a file per client and split":
        for client, task in CLIENTS.items():
            (folder / task).mkdir(exist_ok=True)
            for split in ("train", "test"):
                own = [without(e, "client", "task", "split") for e in entries
                       if e["client"] == client and e["split"] == split]
                (folder / task / f"{client}_{split}.jsonl").write_text(lines(own))
    else:
        import datasets

        if form.startswith("embedded"):
            entries = [e | {"image": {"bytes": (folder / "images" / e["image"]).read_bytes(), "path": None}}
                       for e in entries]
        table = datasets.Dataset.from_list([without(e, "split") if form == "a datasets folder" else e for e in entries])
        if form.startswith("embedded"):
            table = table.cast_column("image", datasets.Image())
        if form == "a datasets folder":
            test = [i for i, e in enumerate(entries) if e["split"] == "test"]
            rest = [i for i in range(len(entries)) if i not in test]
            table = datasets.DatasetDict({"train": table.select(rest), "test": table.select(test)})
            table.save_to_disk(str(folder / "table"))
        else:
            table.to_parquet(str(folder / "all.parquet"))


@pytest.mark.parametrize("form", ["one list", "a file per task", "a file per client",
                                  "a folder per task, a file per client and split", "parquet", "embedded in parquet",
                                  "a datasets folder"])
def test_every_form_of_data_reads_alike(tmp_path, form):
    entries = photo_entries(tmp_path, 2)
    write_form(tmp_path, entries, form)
    path = tmp_path / "table" if form == "a datasets folder" else tmp_path
    names = "client" if form == "a file per client" else "task"
    got = {s.id: s for s in read_samples(path, tmp_path / "images", names)}
    assert set(got) == {e["id"] for e in entries}
    for entry in entries:
        sample = got[entry["id"]]
        assert (sample.task, sample.client, sample.split) == (entry["task"], entry["client"], entry["split"])
        assert sample.turns == tuple((t["from"], t["value"]) for t in entry["conversations"])
        with Image.open(tmp_path / "images" / entry["image"]) as picture:
            np.testing.assert_array_equal(np.asarray(read_image(sample)), np.asarray(picture.convert("RGB")))


def break_first(change):
    def apply(folder):
        entries = json.loads((folder / "all.json").read_text())
        change(entries[1], folder)
        (folder / "all.json").write_text(json.dumps(entries))

    return apply


def set_key(key, value):
    return break_first(lambda entry, folder: entry.update({key: value}))


def spoil_image(content):
    return break_first(lambda entry, folder: (folder / "images" / entry["image"]).write_bytes(content))


def turn(index, **changes):
    return break_first(lambda entry, folder: entry["conversations"][index].update(changes))


BROKEN = {
    "image missing": (set_key("image", "gone.png"), "gone.png does not exist"),
    "image outside the folder": (set_key("image", "../../etc/passwd"), "must be a path inside data.image_root"),
    "image absolute": (set_key("image", "/etc/passwd"), "must be a path inside data.image_root"),
    "image truncated": (spoil_image(b"\x89PNG\r\n\x1a\n\0\0"), "cannot be decoded"),
    "image of zero bytes": (spoil_image(b""), "cannot be decoded"),
    "image is text": (spoil_image(b"hello"), "cannot be decoded"),
    "roles out of order": (turn(0, **{"from": "gpt"}), "conversations[0].from: 'gpt', expected 'human'"),
    "value is no text": (turn(1, value=3), "conversations[1]: expected {from, value} with a text value"),
    "image mark missing": (turn(0, value="what?"), "<image> must stand once, in a human turn"),
    "image mark in the answer": (turn(1, value="<image>"), "<image> must stand once, in a human turn"),
    "no conversations": (set_key("conversations", []), "expected a non-empty list"),
    "unknown split": (set_key("split", "dev"), "split: 'dev', expected one of train, validation, test"),
    "task is a list": (set_key("task", ["vqa"]), "task: ['vqa'] must be a text"),
    "answers are no texts": (set_key("answers", [1, 2]), "answers: expected a list of texts"),
    "entry is no object": (lambda folder: (folder / "all.json").write_text(json.dumps(
        [json.loads((folder / "all.json").read_text())[0], "x"])), "expected an object"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_data_is_named_by_check_and_by_run(call, checkpoint, photos, tmp_path, name):
    spoil, message = BROKEN[name]
    spoil(photos)
    code, out, err = call("data", "check", photos)
    assert code == 2 and message in err and "all.json[1]" in err and "Traceback" not in out + err
    code, out, err = call("run", write_config(tmp_path, checkpoint, photos), "--out", tmp_path / "run")
    assert code == 2 and message in err and "all.json[1]" in err and "Traceback" not in out + err
    assert not (tmp_path / "run").exists()


def write_config(folder, checkpoint, data):
    file = folder / "c.yaml"
    file.write_text(f"model: {{path: {checkpoint}}}\ndata: {{path: {data}}}\n"
                    "federation: {rounds: 1, local_steps: 1}\n")
    return file


def test_check_reports_every_problem_at_once(photos):
    entries = json.loads((photos / "all.json").read_text())
    entries[1]["image"] = "gone.png"
    entries[2]["conversations"].pop()
    entries[3]["split"] = "dev"
    copy = dict(entries[6], id="copy", client="south", split="test")
    odd = dict(entries[7], id="odd", task="caption")
    (photos / "all.json").write_text(json.dumps([*entries, copy, odd]))
    report = check_data(photos, parse_config({}).data)
    assert [any(word in error for error in report.errors) for word in (
        "gone.png", "must be an answer", "split: 'dev'", "'south' has samples of several tasks")] == [True] * 4
    assert len(report.errors) == 4
    # Both added samples have the conversation and the image of another sample; the copy is in another split.
    assert any("several splits" in w for w in report.warnings)
    assert report.counts["caption", "clinic", "train"] == 4 and report.length_unit == "characters"
    assert sum(n for _, _, n in report.lengths) == 19


def test_check_finds_samples_shared_between_clients_and_cut_answers(photos, checkpoint):
    entries = json.loads((photos / "all.json").read_text())
    twin = dict(entries[1], id="twin", client="south")
    (photos / "all.json").write_text(json.dumps([*entries, twin]))
    model = pilot_jax.load(checkpoint)
    data = parse_config({"data": {"template": "vicuna_short", "max_length": 24}}).data
    report = check_data(photos, data, model)
    assert not report.errors
    assert any("1 sample occurs in several clients" in w and "[1]" in w for w in report.warnings)
    assert any("lose the end of their answers" in w for w in report.warnings)


def test_a_run_says_how_many_answers_it_cuts(photos, checkpoint, caplog):
    from pilot_jax.runs.prepare import prepare

    raw = {"model": {"path": str(checkpoint)}, "data": {"path": str(photos), "template": "vicuna_short"}}
    fed = prepare(parse_config(raw)).federation
    longest = fed.clients[0].train["input_ids"].shape[1]
    raw["data"]["max_length"] = int(max((c.train["attention_mask"].sum(1).max()) for c in fed.clients)) - 1
    with caplog.at_level(logging.WARNING, "pilot_jax"):
        shorter = prepare(parse_config(raw)).federation
    assert "cuts the answers of" in caplog.text and "all.json[" in caplog.text
    assert shorter.clients[0].train["input_ids"].shape[1] <= longest


def test_pad_to_square_keeps_everything_in_the_middle():
    picture = Image.new("RGB", (6, 2), (255, 0, 0))
    square = np.asarray(pad_to_square(picture, (1, 2, 3)))
    assert square.shape == (6, 6, 3)
    assert (square[2:4] == (255, 0, 0)).all() and (square[:2] == (1, 2, 3)).all() and (square[4:] == (1, 2, 3)).all()
    tall = np.asarray(pad_to_square(picture.rotate(90, expand=True), (1, 2, 3)))
    np.testing.assert_array_equal(tall, square.transpose(1, 0, 2))


def test_pixels_are_the_processors(checkpoint):
    """The pixels are those of transformers' image processor: of the image, or with `pad` of its padded square."""
    from transformers import CLIPImageProcessorPil

    model = pilot_jax.load(checkpoint)
    picture = photograph(np.random.default_rng(0), 50, 30)
    processor = CLIPImageProcessorPil.from_pretrained(checkpoint)
    np.testing.assert_array_equal(pixel_values(model, [picture]),
                                  processor(images=[picture], return_tensors="np")["pixel_values"])
    mean = tuple(int(x * 255) for x in processor.image_mean)
    square = Image.new("RGB", (50, 50), mean)
    square.paste(picture, (0, 10))
    np.testing.assert_array_equal(pixel_values(model, [picture], "pad"),
                                  processor(images=[square], return_tensors="np")["pixel_values"])


@pytest.mark.long
def test_siglip_with_qwen2_runs_too(photos, tmp_path):
    write_checkpoint(tmp_path / "base", text={"model_type": "qwen2"}, vision={"model_type": "siglip_vision_model"},
                     vision_feature_select_strategy="full")
    raw = {"model": {"path": str(tmp_path / "base"), "lora": {"rank": 2}},
           "data": {"path": str(photos), "template": "chatml"}, "federation": {"rounds": 1, "local_steps": 1},
           "train": {"batch_size": 2}, "eval": {"max_new_tokens": 3}}
    summary = pilot_jax.simulate(parse_config(raw), out=tmp_path / "run").summary
    assert summary["client_steps"] == 8 and np.isfinite(summary["score_mean"])


def test_ten_annotators_are_the_references(tmp_path):
    entry = {"id": "1", "task": "vqa", "client": "c", "answers": ["two"] * 9 + ["3"],
             "conversations": [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "2"}]}
    (tmp_path / "d.json").write_text(json.dumps([entry, without(entry, "answers")]))
    with_answers, plain = read_samples(tmp_path / "d.json")
    assert with_answers.references == ("two",) * 9 + ("3",) and plain.references == ("2",)
