"""Tests with malicious or damaged configs, data, images, checkpoints and run directories.

Each ends with one message that names the cause, exit code 2 and no traceback, and nothing is written. test_cli.py and
test_own_data.py have more such cases.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, llava_entry, slow_except, small_config, with_image, write, write_checkpoint
from PIL import Image

from pilot_jax.config import LimitsConfig
from pilot_jax.data.llava.sample import Entry, parse_sample
from pilot_jax.runs import simulate
from tests.fuzz.refusing import refused


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(20))
CONFIG = {
    "laughs": (LAUGHS, ["unknown key"]),
    "laughs as a value": (LAUGHS.replace("\n", "\n") + "federation: {rounds: *f}\n", ["federation.rounds", "valid integer"]),
    "deep": ("[" * 100_000, ["not valid YAML"]),
    "deep mapping": ("{a: " * 5_000, ["not valid YAML"]),
    "a list": ("[1, 2]", ["mapping of sections, this is a list"]),
    "a text": ("hello", ["mapping of sections, this is a str"]),
    "code": ("!!python/object/apply:os.system ['touch pwned']", ["not valid YAML", "python/object"]),
    "not UTF-8": (b"\xff\xfe\x00", ["not valid YAML"]),
    "a date that is none": ("train: {lr_connector: 2026-99-99}", ["not valid YAML"]),
    "enormous": (b"# " + b"x" * 2_000_000, ["too many for a config"]),
    "infinite rate": ("train: {lr_connector: .inf}", ["train.lr_connector", "finite"]),
    "no number": ("train: {lr_lora_stage1: .nan}", ["train.lr_lora_stage1"]),
    "a year of rounds": ("federation: {rounds: 1000000000000}", ["federation.rounds", "less than or equal"]),
    "a section that is a number": ("train: 3", ["train", "valid dictionary"]),
    "keys that are no texts": ("1: 2", ["c.yaml: 1", "strings"]),
    "control characters": ("\"tr\\e[31main\": {}", ["unknown key"]),
    "NUL in a path": ("data: {path: \"a\\0b\"}", ["data.path"]),
    "negative mesh": ("system: {mesh: {fsdp: -1}}", ["system.mesh.fsdp", "greater than or equal to 1"]),
    "half a privacy": ("federation: {privacy: {epsilon: 1}}", ["federation.privacy", "clip"]),
    "a key twice": ("train: {lr_connector: 1, lr_connector: 2}", ["c.yaml", "'lr_connector' occurs twice"]),
    "a section twice": ("train: {}\ntrain: {}", ["c.yaml", "'train' occurs twice"]),
    "NUL in a list": ("data: {digits: {scenario: a}}\neval: {metrics: {vqa: \"ex\\0act\"}}", ["eval.metrics.vqa"]),
    "NUL in a folder": ("system: {store: \"a\\0b\"}", ["system.store", "NUL"]),
    "template injection": ("data: {template: '{{ 7 * 7 }}'}", ["data.template", "not known"]),
}


@pytest.mark.parametrize("name", slow_except(CONFIG.keys() - {"template injection"}, CONFIG))
def test_config(call, tmp_path, name):
    content, wanted = CONFIG[name]
    (tmp_path / "c.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(call, tmp_path, ["run", tmp_path / "c.yaml", "--out", tmp_path / "out"], wanted)
    assert not (tmp_path / "pwned").exists()


def turns(human="q", gpt="a"):
    return [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]


DATA = {
    "deep": ("[" * 200_000, ["not valid JSON"]),
    "deep sample": ('[{"conversations": ' + "[" * 50_000 + "]" * 50_000 + "}]", ["d.json"]),
    "huge number": ("[" + "9" * 100_000 + "]", ["d.json"]),
    "an object": ("{}", ["JSON list of samples, this is a dict"]),
    "not UTF-8": (b"[\"\xff\"]", ["cannot be read"]),
    "half a character": ('[{"client": "c", "task": "t", "conversations": [{"from": "human", "value": "\\ud800"}, '
                         '{"from": "gpt", "value": "a"}]}]', ["d.json[0]", "conversations[0]", "lone surrogate"]),
    "half a character in an answer": ('[{"client": "c", "task": "t", "answers": ["\\udfff"], "conversations": [{"from": '
                                      '"human", "value": "q"}, {"from": "gpt", "value": "a"}]}]',
                                      ["d.json[0]", "answers", "lone surrogate"]),
    "a number as a text": ([llava_entry(conversations=turns(human=3))], ["conversations[0]", "text value"]),
    "nested roles": ([llava_entry(conversations=[{"from": [[[["x"] * 99] * 99]], "value": "q"}])], ["conversations[0].from"]),
    "no turns": ([llava_entry(conversations=[])], ["non-empty list"]),
    "a list of lists": ([[1]], ["expected an object"]),
    "escape in a client's name": ([llava_entry(client="\x1b]0;owned\x07")], ["client", "control characters"]),
    "newline in a task's name": ([llava_entry(task="a\nb")], ["task", "control characters"]),
    "right-to-left override": ([llava_entry(client="gnp.\u202ecod")], ["client", "control characters"]),
    "half a character in a name": ([llava_entry(client="\ud800")], ["client", "control characters"]),
    "a name no folder can have": ([llava_entry(client="é" * 200)], ["client", "more than 80 bytes"]),
    "a name that is a list": ([llava_entry(client=["c"])], ["client", "must be a text"]),
    "an id that is an object": ([llava_entry(id={"a": 1})], ["id", "text or a number"]),
    "a split that is a list": ([llava_entry(split=["train"])], ["split"]),
    "answers that are numbers": ([llava_entry(answers=[1])], ["answers", "list of texts"]),
    "absolute image": ([with_image("/etc/passwd")], ["image", "inside data.image_root"]),
    "image above": ([with_image("a/../../x.png")], ["image", "inside data.image_root"]),
    "image with NUL": ([with_image("a\0.png")], ["image"]),
    "image of a name too long": ([with_image("a" * 5000)], ["image"]),
    "image is a folder": ([with_image("folder")], ["does not exist"]),
    "link out": ([with_image("link.png")], ["link out of data.image_root", "follow_links"]),
    "link in a circle": ([with_image("circle.png")], ["image"]),
    "folder link out": ([with_image("away/x.png")], ["link out of data.image_root"]),
    "text too long": ([llava_entry(conversations=turns("x" * 2_000_000))], ["2000000 characters", "text_characters"]),
}


@pytest.mark.parametrize("name", DATA)
def test_data(call, tmp_path, name):
    folder = tmp_path / "in"
    (folder / "folder").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "outside" / "x.png")
    (folder / "link.png").symlink_to(tmp_path / "outside" / "x.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "away").symlink_to(tmp_path / "outside")
    content, wanted = DATA[name]
    if isinstance(content, bytes):
        (folder / "d.json").write_bytes(content)
    else:
        write(folder, "d.json", content)
    args = ["run", QUICK, "--set", f"data.path={folder / 'd.json'}", "--set", f"data.image_root={folder}", "--out",
            tmp_path / "out"]
    refused(call, tmp_path, args, wanted)
    code, _, err = call("data", "check", folder / "d.json", "--image-root", folder)
    assert code == 2 and "Traceback" not in err and "Error: " in err


def test_links_may_lead_out_if_asked(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "x.png").symlink_to(tmp_path / "y.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "y.png")
    entry = Entry("d.json[0]", with_image("x.png"), "t", "c", "train")
    assert parse_sample(entry, tmp_path / "root", LimitsConfig(follow_links=True)).image.is_file()
    # The image root itself may always be a link.
    (tmp_path / "linked").symlink_to(tmp_path)
    entry = Entry("d.json[0]", with_image("y.png"), "t", "c", "train")
    assert parse_sample(entry, tmp_path / "linked").image.is_file()


def test_sizes_of_files(call, tmp_path):
    write(tmp_path, "d.json", [llava_entry()])
    refused(call, tmp_path, ["run", QUICK, "--set", f"data.path={tmp_path / 'd.json'}", "--set",
                             "data.limits.file_bytes=10"], ["d.json", "data.limits.file_bytes is 10", "JSONL"])
    write(tmp_path, "e.jsonl", json.dumps(llava_entry()) + "\n" + "x" * 2000)
    refused(call, tmp_path, ["run", QUICK, "--set", f"data.path={tmp_path / 'e.jsonl'}", "--set",
                             "data.limits.text_characters=10"], ["e.jsonl:2", "data.limits.text_characters"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "llava"
    write_checkpoint(folder)
    return folder


def changed(file, *path, value):
    raw = json.loads(file.read_text())
    node = raw
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    file.write_text(json.dumps(raw))


def lying(header: dict, size: int | None = None, body: bytes = b"\0" * 64) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def spoil(tensor):
    """Returns a function that writes one NaN into one tensor of a checkpoint."""
    def do(folder):
        from safetensors.numpy import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        key = next(k for k in weights if tensor in k)
        weights[key] = weights[key].copy()
        weights[key].flat[3] = np.nan
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    return do


ONE = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}
CHECKPOINTS = {
    "header beyond the file": (lambda f: (f / "model.safetensors").write_bytes(lying({"a": ONE}, size=2**40)), ["model.safetensors", "not a readable"]),
    "header longer than it is": (lambda f: (f / "model.safetensors").write_bytes(lying({"a": ONE}, size=60)), ["model.safetensors", "not a readable"]),
    "offsets beyond the file": (lambda f: (f / "model.safetensors").write_bytes(lying({"a": ONE | {"data_offsets": [0, 2**50]}})), ["model.safetensors", "not a readable"]),
    "offsets backwards": (lambda f: (f / "model.safetensors").write_bytes(lying({"a": ONE | {"data_offsets": [64, 0]}})), ["model.safetensors", "not a readable"]),
    "shape and bytes differ": (lambda f: (f / "model.safetensors").write_bytes(lying({"a": ONE | {"shape": [9, 9]}})), ["model.safetensors", "not a readable"]),
    "shape overflows": (lambda f: (f / "model.safetensors").write_bytes(lying({"a": ONE | {"shape": [2**40, 2**40]}})), ["model.safetensors", "not a readable"]),
    "no such dtype": (lambda f: (f / "model.safetensors").write_bytes(lying({"a": ONE | {"dtype": "PICKLE"}})), ["model.safetensors", "not a readable"]),
    "header is no JSON": (lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 5) + b"hello"), ["model.safetensors", "not a readable"]),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), ["model.safetensors", "not a readable"]),
    "another model's tensors": (lambda f: (f / "model.safetensors").write_bytes(lying({"a": ONE})), ["tensors are missing"]),
    "pickled weights": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ["Pickled weights are not read"]),
    "NaN in the tower": (spoil("fc1"), ["holds NaN or Inf"]),
    "NaN in the language model": (spoil("down_proj"), ["holds NaN or Inf"]),
    "config has a key twice": (lambda f: (f / "config.json").write_text('{"model_type": "llava", "model_type": "llava"}'), ["config.json", "'model_type' occurs twice"]),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "JSON object"]),
    "config is deep": (lambda f: (f / "config.json").write_text("[" * 100_000), ["config.json", "not valid JSON"]),
    "a billion layers": (lambda f: changed(f / "config.json", "text_config", "num_hidden_layers", value=10**9), ["text_config.num_hidden_layers", "1 to 1000"]),
    "a million million wide": (lambda f: changed(f / "config.json", "text_config", "intermediate_size", value=10**12), ["text_config.intermediate_size"]),
    "no layers": (lambda f: changed(f / "config.json", "vision_config", "num_hidden_layers", value=0), ["vision_config.num_hidden_layers"]),
    "half a head": (lambda f: changed(f / "config.json", "text_config", "num_attention_heads", value=0), ["config.json"]),
    "more groups than heads": (lambda f: changed(f / "config.json", "text_config", "num_key_value_heads", value=3), ["num_key_value_heads"]),
    "patch larger than the image": (lambda f: changed(f / "config.json", "vision_config", "patch_size", value=999), ["config.json", "patch_size"]),
    "epsilon": (lambda f: changed(f / "config.json", "text_config", "rms_norm_eps", value="x"), ["config.json"]),
    "layer far away": (lambda f: changed(f / "config.json", "vision_feature_layer", value=-99), ["vision_feature_layer"]),
    "rope": (lambda f: changed(f / "config.json", "text_config", "rope_parameters", value={"rope_type": "linear", "factor": "x", "rope_theta": 1e4}), ["config.json"]),
    "image token": (lambda f: changed(f / "config.json", "image_token_index", value=-4), ["image_token_index"]),
    "tokenizer is no JSON": (lambda f: (f / "tokenizer.json").write_text("{"), ["tokenizer cannot be loaded"]),
    "processor of terabytes": (lambda f: changed(f / "preprocessor_config.json", "size", value={"shortest_edge": 10**6}), ["preprocessor_config.json", "at most 8192"]),
    "processor is a list": (lambda f: (f / "preprocessor_config.json").write_text("[]"), ["preprocessor_config.json", "JSON object"]),
    "processor of another size": (lambda f: changed(f / "preprocessor_config.json", "crop_size", value={"height": 32, "width": 32}), ["the image processor gives"]),
    "processor of nothing": (lambda f: changed(f / "preprocessor_config.json", "image_mean", value=[1]), ["image processor"]),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(call, checkpoint, tmp_path, name):
    folder = tmp_path / "llava"
    shutil.copytree(checkpoint, folder)
    damage, wanted = CHECKPOINTS[name]
    damage(folder)
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png")
    write(tmp_path, "d.json", [with_image("x.png")])
    refused(call, tmp_path, ["run", QUICK, "--set", f"model.path={folder}", "--set", f"data.path={tmp_path / 'd.json'}",
                             "--set", "data.template=vicuna_v1", "--out", tmp_path / "out"], wanted)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    simulate.simulate(small_config(federation={"local_steps": 1}), out=folder)
    return folder


def largest(folder: Path) -> Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


RUNS = {
    "no config": (lambda f: (f / "config.yaml").unlink(), ["not a run directory"]),
    "config is code": (lambda f: (f / "config.yaml").write_text("!!python/object/apply:os.system ['x']"), ["not valid YAML"]),
    "no checkpoints": (lambda f: shutil.rmtree(f / "checkpoints"), ["not a run directory"]),
    "index is a list": (lambda f: (f / "checkpoints" / "population.json").write_text("[]"), ["population.json", "damaged"]),
    "index is torn": (lambda f: (f / "checkpoints" / "population.json").write_text('{"ocr_0": {'), ["population.json", "damaged"]),
    "index without stages": (lambda f: (f / "checkpoints" / "population.json").write_text('{"ocr_0": {}}'), ["population.json", "damaged"]),
    "other clients": (lambda f: (f / "checkpoints" / "population.json").write_text('{"x": {"stage": "none", "rounds": 0}}'), ["is not in this run"]),
    "server gone": (lambda f: shutil.rmtree(f / "checkpoints" / "server"), ["no such checkpoint"]),
    "a client gone": (lambda f: shutil.rmtree(f / "checkpoints" / "clients" / "ocr_1"), ["ocr_1", "no such checkpoint"]),
    "a client is a file": (lambda f: (shutil.rmtree(f / "checkpoints" / "clients" / "ocr_1"), (f / "checkpoints" / "clients" / "ocr_1").write_text("")), ["ocr_1"]),
    "a client is another": (lambda f: (shutil.rmtree(f / "checkpoints" / "clients" / "ocr_1"), shutil.copytree(f / "checkpoints" / "server", f / "checkpoints" / "clients" / "ocr_1")), ["ocr_1"]),
    "arrays cut off": (lambda f: os.truncate(largest(f / "checkpoints" / "clients" / "ocr_1"), 100), ["ocr_1"]),
    "rank of another config": (lambda f: (f / "config.yaml").write_text((f / "config.yaml").read_text().replace("rank: 4", "rank: 2")), ["Was it written by another config?"]),
    "summary is torn": (lambda f: (f / "summary.json").write_text("{"), ["summary.json", "not valid JSON"]),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax leaves its event loop open
@pytest.mark.parametrize("name", RUNS)
def test_run_directories(call, finished, tmp_path, name):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    damage, wanted = RUNS[name]
    damage(folder)
    refused(call, tmp_path, ["evaluate", folder], ["run"])
    (folder / "manifest.json").unlink()  # as in a run of an earlier version: no checksum finds the damage
    refused(call, tmp_path, ["evaluate", folder], wanted)


@pytest.mark.long
def test_names_that_are_markup_are_shown_as_they_are(call, tmp_path):
    """Names such as "[/x]", which Rich would read as markup and fail on, are printed unchanged."""
    entries = [llava_entry(id=f"{c}{i}", client=f"[/{c}]", task="[bold]|t", split=s)
               for c in "xy" for i, s in enumerate(("train", "train", "test"))]
    write(tmp_path, "d.json", entries)
    sets = [x for pair in ("federation.rounds=1", "federation.local_steps=1", "eval.max_new_tokens=2",
                           f"data.path={tmp_path / 'd.json'}", "train.batch_size=2") for x in ("--set", pair)]
    code, out, err = call("run", QUICK, *sets, "--out", tmp_path / "run")
    assert code == 0, err
    assert "[/x]" in out and "[bold]|t" in out
    code, out, _ = call("evaluate", tmp_path / "run", "--matrix")
    assert code == 0 and "[/x]" in out
    code, out, _ = call("export", tmp_path / "run", "--client", "[/x]", "--out", tmp_path / "adapter")
    assert code == 0


def test_nothing_is_unpickled():
    """The package uses no pickle, no `allow_pickle`, and no torch.load that can run code.

    The exception are compiled programs in the user's own cache, which are machine code anyway; see tests/unit/test_cache.
    """
    root = Path(simulate.__file__).parent.parent
    source = {p: p.read_text(encoding="utf-8") for p in root.rglob("*.py")}
    assert not [p for p, text in source.items() if ("import pickle" in text and p.name != "programs.py")
                or "allow_pickle" in text]
    assert all("weights_only=True" in text for text in source.values() if re.search(r"(?<!pilot_jax\.)torch\.load", text))
    assert not [p for p, text in source.items() if "exec(" in text or
                "trust_remote_code" in text.replace("trust_remote_code=False", "")]


def test_a_checkpoint_runs_no_code(call, checkpoint, tmp_path, monkeypatch):
    """Its configs name Python files for transformers to run, and whoever is asked says yes. No file is run."""
    folder = tmp_path / "llava"
    shutil.copytree(checkpoint, folder)
    mark = tmp_path / "mark"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        names = {f"Auto{kind}": f"evil.{kind}" for kind in ("Config", "Model", "ImageProcessor", "Processor")}
        changed(folder / file, "auto_map", value=names | {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]})
    changed(folder / "tokenizer_config.json", "tokenizer_class", value="Evil")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    Image.new("RGB", (20, 20)).save(tmp_path / "x.png")
    data = write(tmp_path, "d.json", [with_image("x.png")])
    code, _, err = call("data", "check", data, "--model", folder, "--template", "vicuna_v1")
    assert code in (0, 2) and "Traceback" not in err
    assert not mark.exists() and "trust_remote_code" not in err
