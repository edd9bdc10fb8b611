"""Tests the configs of papers on stand-ins: downloads in the shape of the public ones, tiny models, two steps."""

from __future__ import annotations

import json
import subprocess
import sys
import zlib

import pytest
from conftest import ROOT, write
from PIL import Image
from written_parts import write_parts

from pilot_jax.config import load_config
from pilot_jax.models.packaged import ASSETS
from pilot_jax.models.pretrained import read_shapes
from pilot_jax.testing.checkpoints import write_checkpoint, write_tokenizer

PAPERS = ROOT / "configs" / "papers"
CHAT = ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")


def convert(*arguments):
    done = subprocess.run([sys.executable, PAPERS / "convert.py", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def picture(path):
    """Writes an image whose colour depends on its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = zlib.crc32("/".join(path.parts[-3:]).encode()).to_bytes(4, "big")[:3]
    Image.new("RGB", (40, 30), tuple(colour)).save(path, quality=95)


def write_public(root):
    """Writes GQA, OCR-VQA and COCO captions as their archives have them, with a dozen samples each."""
    for folder in ("gqa", "ocr_vqa", "coco/annotations"):
        (root / folder).mkdir(parents=True)
    for file, count in (("train_balanced_questions.json", 12), ("testdev_balanced_questions.json", 3)):
        write(root / "gqa", file, {f"{file[0]}{i}": {
            "question": "Is it red?", "answer": "yes", "fullAnswer": "Yes, it is.", "imageId": f"{file[1]}{i}",
            "isBalanced": True, "groups": {}, "semantic": []} for i in range(count)})
        for i in range(count):
            picture(root / "gqa" / "images" / f"{file[1]}{i}.jpg")
    write(root / "ocr_vqa", "dataset.json", {f"b{i}": {
        "imageURL": f"http://example.org/I/{i}.jpg", "questions": ["Who wrote this?", "What is the title?"],
        "answers": ["A. Author", "Title"], "title": "Title", "authorName": "A. Author", "genre": "Art",
        "split": 1 if i < 6 else 3 if i < 9 else 2} for i in range(11)})
    for i in range(11):
        picture(root / "ocr_vqa" / "images" / f"b{i}.jpg")
    for folder, count in (("train2017", 9), ("val2017", 3)):
        write(root / "coco" / "annotations", f"captions_{folder}.json", {
            "images": [{"id": i, "file_name": f"{i:012d}.jpg", "height": 30, "width": 40} for i in range(count)],
            "annotations": [{"id": 5 * i + k, "image_id": i, "caption": f"A  red thing,\nnumber {k}."}
                            for i in range(count) for k in range(5)]})
        for i in range(count):
            picture(root / "coco" / folder / f"{i:012d}.jpg")


@pytest.fixture(scope="module")
def pilot_data(tmp_path_factory):
    root = tmp_path_factory.mktemp("pilot")
    write_public(root)
    for what in ("gqa", "ocr_vqa", "coco"):
        convert(what, root, root / "out", "--train", 9, "--test", 3)
    return root


@pytest.fixture(scope="module")
def fcit_data(tmp_path_factory):
    """Writes one task of FCIT: LLaVA's entries to train, questions with answers to test."""
    root = tmp_path_factory.mktemp("fcit")
    (root / "instructions" / "DVQA").mkdir(parents=True)
    write(root / "instructions" / "DVQA", "train.json", [
        {"id": str(i), "image": f"DVQA/images/{i % 3}.png", "conversations": [
            {"from": "human", "value": f"<image>\nHow tall is bar {i}?"}, {"from": "gpt", "value": f"{i}"}]}
        for i in range(120)])
    write(root / "instructions" / "DVQA", "test.json", [
        {"question_id": i, "image": f"DVQA/images/{i % 3}.png", "text": "How tall is the last bar?", "answer": f"{i}"}
        for i in range(50)])
    for i in range(3):
        picture(root / "datasets" / "DVQA" / "images" / f"{i}.png")
    convert("fcit", root, root / "out", "--task", "DVQA")
    return root


@pytest.fixture(scope="module")
def nature_data(tmp_path_factory):
    """Writes Fed-Nature's files of two clients."""
    root = tmp_path_factory.mktemp("nature")
    for split, count in (("train", 6), ("test", 2)):
        (root / "clients" / split).mkdir(parents=True)
        for client in ("captions", "questions"):
            write(root / "clients" / split, f"{client}.json", [
                {"id": i, "image": f"{client}_{split}_{i}.jpg", "conversations": [
                    {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "red"}]}
                for i in range(count)])
            for i in range(count):
                picture(root / "images" / f"{client}_{split}_{i}.jpg")
    convert("fed_nature", root, root / "out")
    return root


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns, by config, overrides that put tiny models in the place of its own."""
    from transformers import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("models")
    write_parts(folder)
    write_checkpoint(folder / "llava")
    write_tokenizer(folder / "language", size=390, image=False, chat_template=CHAT)
    side = json.loads((folder / "tower" / "config.json").read_text())["image_size"]
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}
                          ).save_pretrained(folder / "tower")
    vision, language = (json.loads((folder / name / "config.json").read_text()) for name in ("tower", "language"))
    convert("projector", folder / "made.safetensors", "--sizes", vision["hidden_size"], language["hidden_size"])
    parts = [f"model.parts.vision={folder / 'tower'}", f"model.parts.language={folder / 'language'}"]
    return {"pilot": [*parts, f"model.parts.projector={folder / 'mm_projector.safetensors'}"],
            "fcit_task_hom": [f"model.path={folder / 'llava'}"],
            "fed_nature": [*parts, f"model.parts.projector={folder / 'made.safetensors'}"]}


DATA = {"pilot": "pilot_data", "fcit_task_hom": "fcit_data", "fed_nature": "nature_data"}
SMALL = ["model.dtype=float32", "model.lora.rank=4", "train.batch_size=2", "train.microbatch=null",
         "federation.local_steps=2", "federation.rounds=1", "eval.max_new_tokens=2", "eval.batch_size=2"]


def overrides(root, *more):
    return [word for one in (f"data.path={root / 'out'}", f"data.image_root={root}", *more) for word in ("--set", one)]


def test_what_is_written(pilot_data, fcit_data, nature_data):
    """Every sample has its question, its answers, its image and its split."""
    out = pilot_data / "out"
    assert {f.name for f in out.iterdir()} == {"gqa.json", "gqa_test.json", "ocr_vqa.json", "ocr_vqa_test.json",
                                               "ocr_vqa_validation.json", "caption.json", "caption_test.json"}
    counts = {f.stem: len(json.loads(f.read_text())) for f in out.iterdir()}
    assert counts == {"gqa": 9, "gqa_test": 3, "ocr_vqa": 9, "ocr_vqa_test": 3, "ocr_vqa_validation": 3, "caption": 9,
                      "caption_test": 3}
    for file in out.iterdir():
        assert all((pilot_data / e["image"]).is_file() for e in json.loads(file.read_text()))
    caption = json.loads((out / "caption_test.json").read_text())[0]
    assert caption["answers"] == [f"A red thing, number {k}." for k in range(5)] and caption["split"] == "test"
    assert caption["conversations"][1]["value"] == caption["answers"][0]
    test = json.loads((fcit_data / "out" / "dvqa_test.json").read_text())[4]
    assert test["conversations"] == [{"from": "human", "value": "<image>\nHow tall is the last bar?"},
                                     {"from": "gpt", "value": "4"}] and test["image"] == "datasets/DVQA/images/1.png"
    nature = json.loads((nature_data / "out" / "captions.json").read_text())
    assert {(e["client"], e["task"], e["split"]) for e in nature} == {("captions", "captions", "train")}


@pytest.mark.parametrize("name", DATA)
def test_the_config_fits_the_data(name, call, request, models):
    root, config = request.getfixturevalue(DATA[name]), PAPERS / f"{name}.yaml"
    code, out, err = call("data", "check", root / "out", "--config", config, "--image-root", root)
    assert code == 0 and "all readable" in out and "Warning" not in out, out + err
    code, out, err = call("plan", config, *overrides(root, *models[name]))
    assert code == 0 and "Assumed" not in out, out + err


@pytest.mark.parametrize(("name", "layers", "width"), [("pilot", 32, 4096), ("fcit_task_hom", 32, 4096),
                                                       ("fed_nature", 28, 3072)])
def test_it_can_be_planned_without_weights(name, layers, width, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load_config(PAPERS / f"{name}.yaml")
    spec, folder = read_shapes(config.model)
    assert (spec.text.num_layers, spec.text.hidden_size) == (layers, width) and folder.parent == ASSETS / "shapes"
    assert "NOBODY HAS RUN THIS HERE" in (PAPERS / f"{name}.yaml").read_text()


@pytest.mark.long
@pytest.mark.parametrize("name", ["pilot", "fcit_task_hom", "fed_nature"])
def test_two_steps(name, call, request, models, tmp_path):
    root = request.getfixturevalue(DATA[name])
    code, out, err = call("run", PAPERS / f"{name}.yaml", *overrides(root, *models[name], *SMALL), "--out",
                          tmp_path / "run")
    assert code == 0, out + err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    phases = 2 if name == "pilot" else 1
    trained = {"pilot": 9, "fcit_task_hom": 5, "fed_nature": 2}[name]
    assert summary["client_steps"] == 2 * phases * trained and summary["bytes_up"] > 0
    assert len(summary["score_by_client"]) == {"pilot": 9, "fcit_task_hom": 50, "fed_nature": 2}[name]


def test_the_table_has_no_number_without_a_run():
    """A row of *published / ours* has either both numbers and a run, or neither."""
    rows = [line.strip("|").split("|") for line in (ROOT / "docs" / "papers.md").read_text().splitlines()
            if line.startswith("| `") and "yaml" in line and line.count("|") == 7]
    assert len(rows) == 5
    for row in rows:
        numbers, run = [cell.strip() for cell in row[2:5]], row[5].strip()
        assert (numbers == ["–"] * 3) == (run == "not run"), row
