"""Tests the command line: exit codes, messages, and the files that are written or not."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import QUICK, ROOT, llava_entry, slow_except, small_config, tree_max_difference, with_image, write
from PIL import Image
from rich.console import Console

from pilot_jax.config import known_keys, read_settings
from pilot_jax.embedded.instruct import InstructConfig
from pilot_jax.embedded.pretrain import PretrainConfig
from pilot_jax.errors import InputError
from pilot_jax.real.pretrain import RealPretrainConfig
from pilot_jax.runs.progress import ProgressDisplay


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def broken_image(folder):
    write(folder, "x.png", "no")
    return write(folder, "d.json", [with_image("x.png")])


def shown_image(folder):
    Image.new("RGB", (8, 8)).save(folder / "x.png")
    return write(folder, "d.json", [with_image("x.png")])


def long_question():
    return llava_entry(conversations=[{"from": "human", "value": "which of these digits is red?"},
                                 {"from": "gpt", "value": "7"}])


BAD = {
    "no such config": (lambda d: ["run", d / "none.yaml"], ["none.yaml", "cannot be read"]),
    "config is not YAML": (lambda d: ["run", write(d, "c.yaml", "a: [")], ["c.yaml", "not valid YAML"]),
    "unknown key": (lambda d: ["run", QUICK, "--set", "federation.round=2"],
                    ["--set federation.round=2", "unknown key", "Did you mean 'federation.rounds'"]),
    "unknown section": (lambda d: ["run", write(d, "c.yaml", "trian: {}")], ["trian", "Did you mean 'train'"]),
    "M = 0": (lambda d: ["run", QUICK, "--set", "strategy.ata.neighbors=0"],
              ["strategy.ata.neighbors", "greater than or equal to 1", "got 0"]),
    "temperature 0": (lambda d: ["run", QUICK, "--set", "strategy.ata.temperature=0"],
                      ["strategy.ata", "temperature must be 'auto' or > 0"]),
    "unknown strategy": (lambda d: ["run", QUICK, "--set", "strategy.name=fedpilot"], ["strategy.name", "'pilot'"]),
    "malformed override": (lambda d: ["run", QUICK, "--set", "rounds"], ["--set rounds", "section.key=value"]),
    "unknown template": (lambda d: ["run", QUICK, "--set", "data.template=alpaca"],
                         ["data.template", "'alpaca'", "vicuna_v1"]),
    "unknown task": (lambda d: ["run", QUICK, "--set", "eval.metrics={segmentation: iou}"],
                     ["eval.metrics", "unknown task 'segmentation'", "caption, ocr, vqa"]),
    "unknown client in participation": (
        lambda d: ["run", QUICK, "--set", "federation.participation=[{round: 2, clients: [bob]}]",
                   "--set", "data.digits.train=2"], ["federation.participation", "round 2", "bob", "caption_0"]),
    "no data": (lambda d: ["run", QUICK, "--set", f"data.path={d / 'nothing.json'}"], ["data.path", "nothing.json"]),
    "data is not JSON": (lambda d: ["run", QUICK, "--set", f"data.path={write(d, 'd.json', '[{')}"],
                         ["d.json", "not valid JSON"]),
    "missing image": (lambda d: ["run", QUICK, "--set", f"data.path={write(d, 'd.json', [with_image('no.png')])}"],
                      ["d.json[0]", "image", "no.png does not exist", "data.image_root"]),
    "broken image": (
        lambda d: ["run", QUICK, "--set", f"data.path={broken_image(d)}"],
        ["d.json[0]", "x.png cannot be decoded"]),
    "empty client": (
        lambda d: ["run", QUICK, "--set", "data.path=" + str(
            write(d, "d.json", [llava_entry(), llava_entry(client="e", split="test")]))],
        ["client 'e'", "no training sample"]),
    "client of two tasks": (
        lambda d: ["run", QUICK, "--set", f"data.path={write(d, 'd.json', [llava_entry(), llava_entry(task='u')])}"],
        ["client 'c'", "several tasks (t, u)"]),
    "sample without client": (
        lambda d: ["run", QUICK, "--set", f"data.path={write(d, 'd.json', [llava_entry(client=None)])}"],
        ["d.json[0]", "client", "data.partition"]),
    "the whole answer is beyond the limit": (
        lambda d: ["run", QUICK, "--set", f"data.path={write(d, 'd.json', [long_question()])}",
                   "--set", "data.max_length=8"],
        ["d.json[0]", "no answer token within data.max_length (8)"]),
    "the limit would cut the image": (
        lambda d: ["run", QUICK, "--set", f"data.path={shown_image(d)}", "--set", "data.max_length=20"],
        ["d.json[0]", "data.max_length: 20 would cut the image (36 tokens)"]),
    "checkpoint that is not LLaVA": (
        lambda d: ["run", QUICK, "--set", f"model.path={write(d, 'config.json', {'model_type': 'llama'}).parent}"],
        ["config.json", "model_type is 'llama'", "expected 'llava'"]),
    "no checkpoint": (lambda d: ["run", QUICK, "--set", f"model.path={d / 'nowhere'}"], ["model.path", "nowhere"]),
    "not a run": (lambda d: ["evaluate", d], ["not a run directory"]),
    "generate without image": (lambda d: ["generate", d, "--client", "c", "--image", d / "i.png", "--prompt", "q"],
                               ["--image", "i.png does not exist"]),
    "digits into an existing folder": (lambda d: ["data", "digits", d], ["exists already"]),
    "pretrain key": (lambda d: ["pretrain", write(d, "p.yaml", "widht: 3"), d / "o"], ["p.yaml", "widht", "unknown"]),
}


# These load the model.
LOADING = {"no checkpoint", "checkpoint that is not LLaVA", "unknown template", "unknown task"}


@pytest.mark.parametrize("name", slow_except(BAD.keys() - LOADING, BAD))
def test_bad_input_is_one_clear_message(call, tmp_path, name):
    args, wanted = BAD[name]
    args = args(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    code, _, err = call(*args)
    assert code == 2
    for text in wanted:
        assert text in err, err
    assert "Traceback" not in err and err.startswith("Error: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # nothing half-written


def test_used_run_directory_is_refused(call, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "summary.json").write_text("{}")
    code, _, err = call("run", QUICK, "--out", tmp_path / "old")
    assert code == 2 and "is not empty" in err
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["summary.json"]


def test_roles_prints_the_table_of_the_architecture_page(call):
    code, out, _ = call("roles", QUICK)
    assert code == 0
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for line in out.strip().splitlines()[1:]:
        assert line.strip() in page, line
    code, out, _ = call("roles", QUICK, "--json")
    rows = {row["subtree"]: row for row in json.loads(out)}
    # LoRA: R·(d_in + d_out) per linear: q, k, v, o 128→128; gate, up 128→352; down 352→128; 4 layers, R = 8
    assert rows["text_adapter"]["parameters"] == 4 * 8 * (4 * 256 + 3 * 480)
    assert rows["task"]["parameters"] == 2 * (128 * 128 + 128)


@pytest.mark.slow
def test_run_evaluate_generate_and_check(call, tmp_path):
    """Several commands one after another, on data that `data digits` has written."""
    code, out, _ = call("data", "digits", tmp_path / "scenes", "--train", 4, "--validation", 1, "--test", 2)
    assert code == 0 and "63 samples" in out
    code, out, _ = call("data", "check", tmp_path / "scenes")
    assert code == 0 and "63 samples, all readable" in out
    raw = small_config(federation={"local_steps": 1}).model_dump(mode="json")
    raw["data"]["path"] = str(tmp_path / "scenes")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(raw))
    code, out, _ = call("run", tmp_path / "c.yaml", "--out", tmp_path / "run")
    assert code == 0 and "client-steps/s" in out and "caption_0" in out and "9 clients" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    again = ("run", tmp_path / "c.yaml", "--out", tmp_path / "run", "--resume", "--progress")  # the run has ended
    assert call(*again, "quiet") == (0, "", "")
    code, out, _ = call(*again, "json")
    assert code == 0 and json.loads(out)["score_by_client"] == summary["score_by_client"]
    assert call(*again, "loud")[0] == 2
    code, out, _ = call("evaluate", tmp_path / "run", "--json")
    assert code == 0 and json.loads(out)["score_by_client"] == summary["score_by_client"]
    image = next((tmp_path / "scenes" / "images").glob("ocr_1-test*"))
    code, out, _ = call("generate", tmp_path / "run", "--client", "ocr_1", "--image", image, "--prompt", "read.")
    assert code == 0 and out.strip()
    code, _, err = call("generate", tmp_path / "run", "--client", "bob", "--image", image, "--prompt", "read.")
    assert code == 2 and "--client: 'bob' is not in this run" in err


@pytest.mark.long
def test_pretrain_writes_a_loadable_base(call, tmp_path):
    """After a very short pretraining with the shipped config, made smaller, the written directory can be loaded, and
    no other files are left."""
    shipped = yaml.safe_load((ROOT / "configs" / "pretrain.yaml").read_text()) or {}
    small = {"vision_steps": 2, "language_steps": 2, "batch": 4, "width": 32, "layers": 1, "heads": 2}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(shipped | small))
    code, out, _ = call("pretrain", tmp_path / "p.yaml", tmp_path / "base")
    assert code == 0 and "held-out handwriting" in out
    import pilot_jax

    assert pilot_jax.load(tmp_path / "base").config.vision.hidden_size == 32
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "p.yaml"]


@pytest.mark.slow
def test_pretrain_of_the_instructed_base(call, tmp_path):
    """A step of the shipped config changes projector and decoder of the embedded base, and not its tower."""
    shipped = yaml.safe_load((ROOT / "configs" / "pretrain_instructed.yaml").read_text())
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(shipped | {"language_steps": 2, "batch": 4}))
    code, out, _ = call("pretrain", tmp_path / "p.yaml", tmp_path / "base")
    assert code == 0 and "right answers on held-out handwriting" in out
    import pilot_jax

    made, start, instructed = (pilot_jax.load(path).base for path in (tmp_path / "base", "embedded", "instructed"))
    for one in (made, instructed):
        assert tree_max_difference(one["vision_tower"], start["vision_tower"]) == 0
        assert min(tree_max_difference(one[name], start[name]) for name in ("projector", "decoder")) > 1e-4
    code, _, err = call("pretrain", tmp_path / "p.yaml", tmp_path / "base")
    assert code == 2 and "exists already" in err


def test_the_shipped_pretraining_configs_are_read(tmp_path):
    """Its values are the defaults. A learning rate may be any positive number, also an integer."""
    assert read_settings(ROOT / "configs" / "pretrain_instructed.yaml", InstructConfig) == InstructConfig()
    assert read_settings(ROOT / "configs" / "pretrain.yaml", PretrainConfig) == PretrainConfig()
    assert read_settings(ROOT / "configs" / "pretrain_real.yaml", RealPretrainConfig) == RealPretrainConfig()
    assert read_settings(write(tmp_path, "p.yaml", "{lr: 1, seed: 0}"), PretrainConfig).lr == 1
    for bad in ("lr: 0", "lr: -0.1", "lr: true", "lr: .inf", "lr: .nan", "lr: x", "seed: -1", "width: 0", "width: 1.5"):
        with pytest.raises(InputError, match="expected a positive"):
            read_settings(write(tmp_path, "p.yaml", bad), PretrainConfig)


@pytest.mark.parametrize(("error", "code", "says"), [
    (RuntimeError("odd\nthing"), 1, "Failed: RuntimeError: odd thing. This is an error of pilot_jax."),
    (RecursionError("deep"), 1, "RecursionError"), (MemoryError(), 1, "not enough memory"),
    (OSError(errno.ENOSPC, "No space left on device", "x/y"), 1, "x/y: No space left on device"),
    (PermissionError(errno.EACCES, "Permission denied", "x/\x1b[31m"), 2, "x/\\x1b[31m: Permission denied"),
    (OSError(errno.EROFS, "Read-only file system", "x"), 2, "Read-only file system"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "File name too long")])
def test_every_error_ends_in_a_message(call, monkeypatch, error, code, says):
    """An error that no command expects is one line too, and its traceback is in a file."""
    def fails(*_):
        raise error

    monkeypatch.setattr("pilot_jax.cli.inspect.read_config", fails)
    got, out, err = call("roles", QUICK)
    assert got == code and says in err and "Traceback" not in out + err and err.strip().count("\n") == 0
    if "This is an error of pilot_jax" in err:
        file = Path(re.search(r"traceback in (\S+)\.$", err.strip())[1])
        assert "in fails" in file.read_text()
        file.unlink()


@pytest.mark.parametrize(("command", "code"), [
    (("run", "/dev/zero"), 2), (("run", "x" * 5000), 2),
    (("data", "digits", "/proc/none/x", "--train", "1", "--validation", "1", "--test", "1"), 2),
    (("data", "check", "x" * 5000), 2), (("evaluate", "x" * 5000), 2), (("report", "x" * 5000), 2),
    (("export", "x" * 5000, "--client", "c", "--out", "/proc/x"), 2), (("pretrain", "/dev/zero", "/proc/none"), 2)])
def test_paths_that_cannot_be_used(call, command, code):
    got, out, err = call(*command)
    assert got == code and "Traceback" not in out + err and err.startswith("Error: ")
    assert "This is an error of pilot_jax" not in err


def test_import_and_help_do_not_load_jax():
    code = "import sys, pilot_jax, pilot_jax.cli; sys.exit('jax' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_schema_knows_the_configs(call):
    """The JSON schema accepts and refuses the same configs as the loader."""
    validator = jsonschema.Draft202012Validator(json.loads(call("schema")[1]))
    validator.check_schema(validator.schema)
    for file in sorted((ROOT / "configs").rglob("*.yaml")):
        if not file.stem.startswith("pretrain"):  # the configs of `pilot-jax pretrain` have another schema
            assert not list(validator.iter_errors(yaml.safe_load(file.read_text()))), file
    for wrong in ({"train": {"batchsize": 3}}, {"train": {"batch_size": 0}}, {"strategy": {"name": "fedavgg"}}):
        assert list(validator.iter_errors(wrong)), wrong


@pytest.mark.slow
def test_keys_can_be_completed():
    completion = {"_PILOT_JAX_COMPLETE": "complete_bash", "COMP_WORDS": "pilot-jax run x.yaml --set train.lr",
                  "COMP_CWORD": "4"}
    done = subprocess.run([Path(sys.executable).parent / "pilot-jax"], capture_output=True, text=True,
                          env=os.environ | completion)
    assert done.stdout.split() == ["train.lr_connector=", "train.lr_lora_stage1=", "train.lr_lora_stage2="], done
    sections = {"model", "data", "federation", "strategy", "train", "eval", "system"}
    silent = {key for key, text in known_keys().items() if not text}
    assert all(key in sections or any(k.startswith(key + ".") for k in known_keys()) for key in silent), silent


def test_bars_on_a_terminal():
    """The display has a bar for the run and one for the phase, with the remaining time and the last score."""
    out = io.StringIO()
    display = ProgressDisplay(console=Console(file=out, force_terminal=True, width=120))
    display.begin(40, rounds=2)
    display.note("3 clients [red]")
    for clients in (1, 3):
        display.chunk_trained({"round": 1, "phase": "stage1", "steps": 5 * clients, "of": 3, "clients": clients,
                               "loss": 0.5})
    display.phase_ended(None, {"round": 1, "phase": "stage1", "loss": 0.5, "effective_neighbors": 1.5, "seconds": 2.0,
                               "client_steps": 15}, {}, ())
    display.round_scored(1, 0.25)
    display.chunk_trained({"round": 2, "phase": "stage2", "steps": 5, "of": 3, "clients": 1, "loss": 0.4})
    display._bar.refresh()
    display.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "3 clients [red]" in text and "round 1 stage1: loss 0.500, effective neighbours 1.50, 2.0 s" in text
    assert re.search(r"run, client steps.*20/40.* m?s left, round 1: validation score 0.250", text)
    assert re.search(r"round 2/2 stage2, clients.*1/3.*loss 0.400", text)


def test_events_as_lines_of_json(capsys):
    chunk = {"round": 1, "phase": "stage1", "steps": 2, "of": 3, "clients": 1, "loss": 0.5}
    phase = {"round": 1, "phase": "stage1", "loss": 0.5, "effective_neighbors": 1.5, "seconds": 2.0, "client_steps": 6}
    events = [{"kind": "note", "text": "warning: 1"}, {"kind": "score", "text": "round 1: validation score 0.250"},
              {"kind": "chunk"} | chunk, {"kind": "phase"} | phase]
    for mode in ("json", "quiet"):
        display = ProgressDisplay(mode=mode)
        display.begin(6, rounds=1)
        display.note("warning: 1")
        display.round_scored(1, 0.25)
        display.chunk_trained(chunk)
        display.phase_ended(None, phase | {"bytes_up_by_subtree": {"task": 1}}, {}, ())
        display.phase_ended(None, phase, None, ())  # a phase without a usable upload
        display.close()
        out, err = capsys.readouterr()
        assert [json.loads(line) for line in out.splitlines()] == (events if mode == "json" else [])
        assert err == ("" if mode == "json" else "warning: 1\n")


@pytest.mark.parametrize("encoding", ["ascii:strict", "latin-1:strict", "utf-8:strict"])
def test_no_character_ends_a_command(tmp_path, encoding):
    """`plan` prints a dash, and `runs` a folder's name with an e acute that is not UTF-8."""
    folder = os.fsdecode(b"caf\xe9 \xf0\x9f\x98\x80")
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "config.yaml").write_text(small_config().to_yaml())
    (tmp_path / folder / "manifest.json").write_text("{}")
    for arguments, shown in ((["plan", f"{folder}/config.yaml"], "FLOP"), (["runs", "."], "caf")):
        done = subprocess.run([Path(sys.executable).parent / "pilot-jax", *arguments], capture_output=True,
                              cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": encoding})
        assert done.returncode == 0 and shown in done.stdout.decode(errors="replace"), done.stderr
