"""Bad inputs in classes: what a command is given, and a part of the message that it must end with.

`python tests/fuzz/bad_inputs.py` lists them. test_bad_inputs.py tries them all; test_hostile.py has more classes, whose
cases need checks of their own (configs, data, images, checkpoints, run directories).
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import yaml
from conftest import QUICK, llava_entry, with_image
from PIL import Image

from pilot_jax.config import STRATEGY_PARAMS, Config, Section


@dataclasses.dataclass(frozen=True)
class Case:
    """A bad input: `make` writes files into a new folder and returns the command's arguments."""

    kind: str
    name: str
    says: str
    make: Callable[[Path], list[Any]]


CASES: list[Case] = []


def case(kind: str, name: str, says: str, make: Callable[[Path], list[Any]]) -> None:
    CASES.append(Case(kind, name, says, make))


def file(folder: Path, name: str, content: Any) -> Path:
    """Writes a file: bytes and texts as they are, other values as JSON."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, bytes | str) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
    return path


# Every number of the config, below its least and above its largest value.
def numbers(model: type[Section], prefix: str = "") -> list[tuple[str, str]]:
    out = []
    for name, field in model.model_fields.items():
        bounds = {type(m).__name__: getattr(m, type(m).__name__.lower()) for m in field.metadata
                  if type(m).__name__ in ("Ge", "Gt", "Le", "Lt")}
        for bound, value in bounds.items():
            wrong = value if bound in ("Gt", "Lt") else value - 1 if bound == "Ge" else value + 1
            out.append((prefix + name, repr(wrong)))
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                out += numbers(kind, f"{prefix}{name}.")
    return out


for key, wrong in numbers(Config) + numbers(STRATEGY_PARAMS["pilot"], "strategy."):
    if not key.startswith(("model.parts", "federation.participation")):
        case("a number beyond its bounds", f"{key}={wrong}", key.rsplit(".", 1)[-1],
             lambda d, key=key, wrong=wrong: ["run", QUICK, "--set", f"{key}={wrong}", "--out", d / "out"])
for key in ("train.lr_connector", "train.weight_decay", "data.max_length", "federation.rounds", "eval.temperature",
            "system.client_chunk", "system.seed", "model.lora.rank", "model.lora.alpha", "strategy.ata.temperature",
            "federation.dropout", "train.batch_size"):
    for wrong in (".nan", "x", "[1]", "true" if "lr_" not in key else "{a: 1}"):
        case("a value of another type", f"{key}={wrong}", key.rsplit(".", 1)[-1],
             lambda d, key=key, wrong=wrong: ["run", QUICK, "--set", f"{key}={wrong}", "--out", d / "out"])

for text, says in {
        "": "section.key=value", "=1": "section.key=value", "train": "section.key=value", "train=3": "train",
        "train.lr=1": "unknown key", "train.lr_connector.x=1": "Did you mean 'train.lr_connector'",
        "train..x=1": "unknown key", "a=b: c: d": "unknown key", "train.lr_connector=b: c: d": "not valid YAML",
        "train.lr_connector=[": "not valid YAML", "train.lr_connector={a: 1, a: 2}": "twice",
        "strategy.name=none": "none", "strategy.name=no.module:Class": "no.module", "strategy.name=os:nothing": "os",
        "strategy.name=json:JSONDecoder": "JSONDecoder", "federation.joins={nobody: 2}": "nobody",
        "data.path=/nowhere/at/all": "/nowhere/at/all", "model.path=/nowhere": "/nowhere",
        "data.path=" + "x" * 5000: "xxx", "model.path=" + "y" * 5000: "yyy", "data.template=x": "data.template",
        "federation.privacy.epsilon=1": "clip", "strategy.name='\\0'": "strategy"}.items():
    case("--set", text[:60], says, lambda d, text=text: ["run", QUICK, "--set", text, "--out", d / "out"])

for name, says, make in (
        ("no such config", "cannot be read", lambda d: ["run", d / "no.yaml"]),
        ("a folder as config", "cannot be read", lambda d: ["run", d]),
        ("a device as config", "too many", lambda d: ["run", "/dev/zero"]),
        ("a config name of 5,000", "", lambda d: ["run", "x" * 5000]),
        ("out is a file", "is a file", lambda d: ["run", QUICK, "--out", file(d, "f", "")]),
        ("out below a file", "", lambda d: ["run", QUICK, "--out", file(d, "f", "") / "x"]),
        ("out below /proc", "cannot be", lambda d: ["run", QUICK, "--out", "/proc/x/y"]),
        ("out of 5,000", "", lambda d: ["run", QUICK, "--out", d / ("x" * 5000)]),
        ("out is not empty", "not empty", lambda d: ["run", QUICK, "--out", file(d, "o/f", "").parent]),
        ("resume something else", "not a run directory", lambda d: ["run", QUICK, "--out", file(d, "o/f", "").parent,
                                                                    "--resume"]),
        ("resume nothing", "--out", lambda d: ["run", QUICK, "--resume"]),
        ("evaluate nothing", "not a run directory", lambda d: ["evaluate", d / "no"]),
        ("evaluate a file", "not a run directory", lambda d: ["evaluate", file(d, "f", "")]),
        ("verify nothing", "not a run directory", lambda d: ["verify", d]),
        ("export nothing", "not a run directory", lambda d: ["export", d, "--client", "a", "--out", d / "x"]),
        ("generate nothing", "not a run directory", lambda d: ["generate", d, "--client", "a", "--prompt", "b"]),
        ("report nothing", "not a run directory", lambda d: ["report", d]),
        ("report over a config", "ends in .html", lambda d: ["report", d, "--out", file(d, "config.yaml", "a: 1")]),
        ("report over a folder", "ends in .html", lambda d: ["report", d, "--out", d]),
        ("report of 5,000", "", lambda d: ["report", "x" * 5000]),
        ("digits into a folder that exists", "exists already", lambda d: ["data", "digits", d]),
        ("digits below a file", "", lambda d: ["data", "digits", file(d, "f", "") / "x"]),
        ("digits below /proc", "", lambda d: ["data", "digits", "/proc/x"]),
        ("pretrain into a folder that exists", "exists already", lambda d: ["pretrain", file(d, "p.yaml", ""), d]),
        ("unknown progress", "--progress", lambda d: ["run", QUICK, "--progress", "loud"]),
        ("half an address", "go together", lambda d: ["run", QUICK, "--coordinator", "127.0.0.1:1"]),
        ("no such process", "--process-id", lambda d: ["run", QUICK, "--coordinator", "127.0.0.1:1", "--num-processes",
                                                       "2", "--process-id", "2"])):
    if "address" not in name and "process" not in name:  # those begin a process of their own; see tests/cluster
        case("arguments and paths", name, says, make)

for name, line, says in (
        ("torn", '{"id": 1', "not valid JSON"), ("a list", "[1]", "expected an object"), ("a text", '"x"', "object"),
        ("a number", "3", "object"), ("null", "null", "object"), ("deep", "[" * 50_000, "JSON"),
        ("no conversations", json.dumps({"id": "1", "client": "c", "task": "t"}), "conversations"),
        ("one turn", json.dumps(llava_entry(conversations=[{"from": "human", "value": "q"}])), "conversations"),
        ("answer first", json.dumps(llava_entry(conversations=[{"from": "gpt", "value": "q"}] * 2)), "conversations"),
        ("another role", json.dumps(llava_entry(conversations=[{"from": "x", "value": "q"}] * 2)), "from"),
        ("two images", json.dumps(llava_entry(image=["a", "b"])), "image"),
        ("image of no file", json.dumps(with_image("no.png")), "does not exist"),
        ("another split", json.dumps(llava_entry(split="dev")), "split"), ("NUL", '{"id": "\0"}', "JSON"),
        ("two values", '{} {}', "JSON")):
    case("lines of JSONL", name, says, lambda d, line=line: ["data", "check", file(d, "d.jsonl", line + "\n")])


def photo(width: int, height: int, fit: str) -> Callable[[Path], list[Any]]:
    def make(folder: Path) -> list[Any]:
        Image.new("L", (width, height)).save(folder / "x.png")
        data = file(folder, "d.json", [with_image("x.png")])
        return ["run", QUICK, "--set", f"data.path={data}", "--set", f"data.image_fit={fit}", "--out", folder / "out"]

    return make


for width, height in ((1, 65500), (65500, 1), (2, 40000), (30000, 3), (3, 20001), (12000, 10)):
    case("narrow images", f"pad {width}×{height}", "would be enlarged", photo(width, height, "pad"))
for width, height in ((1, 65500), (65500, 1), (1, 60000), (60000, 1), (1, 50000)):
    case("narrow images", f"processor {width}×{height}", "would be enlarged", photo(width, height, "processor"))

RESULTS = {"variants": [{"name": "pilot", "score": 0.5, "standard_error": 0.1, "by_task": {"t": 0.5}, "diverged": 0,
                         "base_captions": None, "effective_neighbors": 1.5, "wall_seconds": 1.0, "bytes_up": 1,
                         "bytes_down": 1, "rate_factor": 1.0}],
           "base": {"score": 0.1, "base_captions": None}, "seeds": 1, "split": "test", "factors": [], "rates": {},
           "config": {"federation": {"rounds": 1}}, "seconds_of_all": 1.0, "seconds_of_tuning": 0.0}


def results(folder: Path, content: Any) -> list[Any]:
    return ["report", file(folder, "results.json", content), "--out", folder / "page.html"]


for name, content in {
        "another object": {"a": 1}, "torn": '{"variants": [', "not UTF-8": b'{"a": "\xff"}', "a list": [1], "empty": "",
        "deep": '{"variants": ' + "[" * 100_000, "deep and closed": '{"variants": ' + "[" * 900 + "]" * 900 + "}",
        "a key twice": '{"variants": [], "variants": []}', "no variants": RESULTS | {"variants": []},
        "variants of numbers": RESULTS | {"variants": [1]},
        "no base": {k: v for k, v in RESULTS.items() if k != "base"},
        "HTML as seeds": RESULTS | {"seeds": "<script>alert(1)</script>"},
        "a config of a text": RESULTS | {"config": "x"},
        "rounds of HTML": RESULTS | {"config": {"federation": {"rounds": "<b>"}}}, "factors of texts": RESULTS | {
            "factors": ["<i>"]}, "rates of numbers": RESULTS | {"rates": {"pilot": 3}},
        "differences of texts": RESULTS | {"variants": [RESULTS["variants"][0] | {"differences": {"pilot": "<b>"}}]},
        "warnings that are none": RESULTS | {"warnings": {"a": 1}}, "a margin of HTML": RESULTS | {"margin": "<b>"},
        "a score that is none": json.dumps(RESULTS).replace('"score": 0.5', '"score": NaN'),
        "a score without end": json.dumps(RESULTS).replace('"score": 0.5', '"score": Infinity')}.items():
    case("results.json", name, "results.json", lambda d, content=content: results(d, content))


def run_folder(folder: Path, **files: Any) -> list[Any]:
    """Writes a run directory of an earlier version (without checksums), and returns the command that reports on it."""
    update = {"round": 1, "phase": "plain", "client": "c", "task": "t", "step": 2, "loss": 1.0, "last_loss": 1.0}
    phase = {"round": 1, "phase": "plain", "seconds": 1.0, "client_steps": 2}
    content = {"config.yaml": "{}", "metrics.jsonl": f"{json.dumps(update)}\n{json.dumps(phase)}\n"} | files
    for name, text in content.items():
        if text is not None:
            file(folder, f"run/{name}", text)
    return ["report", folder / "run", "--answers", 0, "--out", folder / "page.html"]


for name, line in {
        "another object": {"a": 1}, "torn in the middle": '{"round": 1', "a list": [1], "a text": "x", "a number": "3",
        "not UTF-8": b'{"round": "\xff"}', "deep": "[" * 50_000, "a round that is a text": {"round": "x"},
        "a client that is an object": {"round": 1, "phase": "p", "client": {}, "task": "t", "loss": 1, "last_loss": 1},
        "no loss": {"round": 1, "phase": "p", "client": "c", "task": "t"},
        "seconds of a text": {"round": 1, "phase": "p", "seconds": "1", "client_steps": 1},
        "no steps": {"round": 1, "phase": "p", "seconds": 1.0},
        "a score of a text": {"round": 1, "client": "c", "score": "x"},
        "bytes of texts": {"round": 1, "phase": "p", "seconds": 1, "client_steps": 1, "bytes_up_by_subtree": {"a": "x"}}
        }.items():
    text = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    case("metrics.jsonl", name, "metrics.jsonl:1",
         lambda d, text=text: run_folder(d, **{"metrics.jsonl": text + b"\n{}\n"}))

SUMMARY = {"strategy": "fedavg", "tasks": ["t"], "task_by_client": {"c": "t"}, "score_by_client": {"c": 0.5},
           "score_by_task": {"t": 0.5}, "score_base_by_client": {"c": 0.1}, "score_base_by_task": {"t": 0.1},
           "score_mean": 0.5, "score_base": 0.1, "client_steps": 2, "client_steps_per_second": 1.0, "bytes_up": 1,
           "bytes_down": 1, "wall_seconds": 1.0, "compile_seconds": 1.0, "peak_memory_bytes": 1}
for name, content in {
        "empty": "", "torn": '{"strategy"', "a list": [1], "another object": {"a": 1}, "not UTF-8": b'{"a": "\xff"}',
        "deep": "[" * 100_000, "a key twice": '{"a": 1, "a": 2}',
        "a client without task": SUMMARY | {"task_by_client": {}},
        "a task that is none": SUMMARY | {"tasks": []}, "scores of texts": SUMMARY | {"score_by_client": {"c": "x"}},
        "a mean of a list": SUMMARY | {"score_mean": []}, "steps of a text": SUMMARY | {"client_steps": "2"},
        "a score of infinity": json.dumps(SUMMARY).replace('"score_mean": 0.5', '"score_mean": Infinity'),
        "no memory": {k: v for k, v in SUMMARY.items() if k != "peak_memory_bytes"}}.items():
    case("summary.json", name, "summary.json", lambda d, content=content: run_folder(d, **{"summary.json": content}))


def mixing(**arrays: Any) -> Callable[[Path], list[Any]]:
    def make(folder: Path) -> list[Any]:
        path = file(folder, "run/mixing/round_0001_plain.npz", "")
        whole = {"weights": np.eye(2), "client_ids": np.asarray(["a", "b"]), "effective_neighbors": np.ones(2)} | arrays
        np.savez(path, **{name: value for name, value in whole.items() if value is not None})
        return run_folder(folder)

    return make


def torn(folder: Path) -> list[Any]:
    arguments = mixing()(folder)
    path = folder / "run/mixing/round_0001_plain.npz"
    path.write_bytes(path.read_bytes()[:200])
    return arguments


for name, make in {
        "torn": torn, "no weights": mixing(weights=None), "no names": mixing(client_ids=None), "no neighbours": mixing(
            effective_neighbors=None), "not square": mixing(weights=np.ones((2, 3))), "too few names": mixing(
            client_ids=np.asarray(["a"])), "distances of another size": mixing(distances=np.zeros((3, 3))),
        "weights of texts": mixing(weights=np.asarray([["a", "b"]] * 2)), "not finite": mixing(
            weights=np.full((2, 2), np.nan)), "a vector": mixing(weights=np.ones(4)),
        "pickled": mixing(weights=np.asarray([[{}, 1], [2, 3]], object)),
        "no archive": lambda d: run_folder(d, **{"mixing/round_0001_plain.npz": "hello"}),
        "empty": lambda d: run_folder(d, **{"mixing/round_0001_plain.npz": ""}),
        "a name without a number": lambda d: run_folder(d, **{"mixing/round_x_plain.npz": ""})}.items():
    case("mixing files", name, "mixing", make)


def checkpoint_with(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], list[Any]]:
    """Returns a function that copies the shipped base with changed tensors, and returns a run on it."""
    def make(folder: Path) -> list[Any]:
        import shutil

        from safetensors.numpy import load_file, save_file

        from pilot_jax.models.pretrained import EMBEDDED, model_directory

        shutil.copytree(model_directory(EMBEDDED), folder / "base")
        tensors = load_file(folder / "base" / "model.safetensors")
        content = change(tensors)
        if content is None:
            save_file(tensors, folder / "base" / "model.safetensors")
        else:
            (folder / "base" / "model.safetensors").write_bytes(content)
        return ["run", QUICK, "--set", f"model.path={folder / 'base'}", "--out", folder / "out"]

    return make


def cast(part: str, dtype: Any, value: Any = None) -> Callable[[dict[str, np.ndarray]], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        name = next(name for name in sorted(tensors) if part in name)
        tensors[name] = tensors[name].astype(dtype)
        if value is not None:
            tensors[name].flat[0] = value

    return change


def doubled(tensors: dict[str, np.ndarray]) -> bytes:
    name, tensor = min(((n, t.astype(np.float32)) for n, t in tensors.items()), key=lambda pair: pair[1].size)
    entry = json.dumps({"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [0, tensor.nbytes]})
    header = f'{{{json.dumps(name)}: {entry}, {json.dumps(name)}: {entry}}}'.encode()
    return struct.pack("<Q", len(header)) + header + tensor.astype(np.float32).tobytes()


for part in ("fc1.weight", "embed_tokens", "linear_1.weight", "q_proj.weight", "norm.weight"):
    for name, dtype, value, says in (("integers", np.int32, None, "int32"), ("booleans", np.bool_, None, "bool"),
                                     ("1e300", np.float64, 1e300, "1e+300"), ("NaN", np.float32, np.nan, "NaN or Inf")):
        case("values of weights", f"{part}: {name}", says, checkpoint_with(cast(part, dtype, value)))
case("values of weights", "a name twice", "occurs twice", checkpoint_with(doubled))

for name, text, says in (
        ("empty list", "[]", "mapping"), ("a text", "hello", "mapping"), ("unknown key", "steps: 3", "steps"),
        ("a rate of a text", "lr: x", "lr"), ("a rate of 0", "lr: 0", "lr"), ("a rate of NaN", "lr: .nan", "lr"),
        ("no steps", "vision_steps: 0", "vision_steps"), ("steps of a list", "vision_steps: [1]", "vision_steps"),
        ("a batch below 0", "batch: -1", "batch"), ("a key twice", "lr: 1.0\nlr: 2.0", "twice"),
        ("not YAML", "lr: [", "not valid YAML"), ("not UTF-8", b"\xff", "not valid YAML"),
        ("true", "batch: true", "batch")):
    case("pretrain configs", name, says, lambda d, text=text: ["pretrain", file(d, "p.yaml", text), d / "base"])

for name, arguments, says in (
        ("no strategy", ["--strategies", "x"], "--strategies"), ("no ablation", ["--strategies", "pilot-x"], "pilot-x"),
        ("an ablation of another", ["--strategies", "fedavg-text_mean"], "--strategies"),
        ("rates of texts", ["--strategies", "pilot", "--rates", "a,b"], "--rates"),
        ("a rate of 0", ["--strategies", "pilot", "--rates", "0"], "--rates"),
        ("an endless rate", ["--strategies", "pilot", "--rates", "1,inf"], "--rates"),
        ("vary the strategy", ["--strategies", "pilot", "--vary", "strategy.name=pilot,local"], "--strategies"),
        ("a margin of 0", ["--strategies", "pilot", "--margin", "0"], "--margin"),
        ("a margin that is none", ["--strategies", "pilot", "--margin", "nan"], "--margin"),
        ("against what is not compared", ["--strategies", "pilot,local", "--against", "fedavg"], "--against"),
        ("another split", ["--strategies", "pilot", "--split", "train"], "--split"),
        ("vary nothing", ["--strategies", "pilot", "--vary", "data.digits.train"], "--vary"),
        ("vary an unknown key", ["--strategies", "pilot", "--vary", "data.x=1,2"], "data.x"),
        ("vary beyond bounds", ["--strategies", "pilot", "--vary", "federation.rounds=1,0"], "federation.rounds"),
        ("a change that is none", ["--strategies", "fedavg,pilot+x"], "section.key=value"),
        ("a change of the last", ["--strategies", "fedavg,pilot+train.x=1"], "train.x"),
        ("a module that is none", ["--strategies", "no.module:Class"], "no.module"),
        ("set beyond bounds", ["--strategies", "pilot", "--set", "federation.rounds=0"], "federation.rounds")):
    case("arguments of compare", name, says, lambda d, arguments=arguments: [
        "compare", QUICK, *arguments, "--out", d / "out"])


def template(text: str) -> Callable[[Path], list[Any]]:
    """Returns a function that copies the shipped base with another chat template, and returns a check with it."""
    def make(folder: Path) -> list[Any]:
        import shutil

        from pilot_jax.models.pretrained import EMBEDDED, model_directory

        shutil.copytree(model_directory(EMBEDDED), folder / "base")
        (folder / "base" / "chat_template.jinja").write_text(text)
        return ["data", "check", file(folder, "d.json", [llava_entry()]), "--model", folder / "base", "--template",
                "tokenizer"]

    return make


for name, text in {
        "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "raises": "{{ raise_exception('no') }}", "syntax": "{% for %}", "unknown filter": "{{ messages | nothing }}",
        "attributes": "{{ messages.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}", "divides": "{{ 1 / 0 }}",
        "a range too long": "{% for i in range(10 ** 9) %}{% endfor %}", "unclosed": "{{ messages", "half": "{{ 3 + }}",
        "undefined": "{{ messages[99].content.x }}", "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "memory": "{{ 'a' * 10 ** 11 }}", "memory of lists": "{{ ([0] * 10 ** 11) | length }}",
        "a text too long": "{{ 'a' * 10 ** 8 }}", "a format": "{{ '%999999999999d' % 1 }}",
        "turned around": "{{ messages[-1].content }}{{ messages[0].content }}"}.items():
    case("chat templates", name, "template", template(text))

if __name__ == "__main__":
    counts: dict[str, int] = {}
    for one in CASES:
        counts[one.kind] = counts.get(one.kind, 0) + 1
        print(f"{one.kind}: {one.name}")
    print(f"{len(CASES)} in {len(counts)} classes:", yaml.safe_dump(counts, sort_keys=False), sep="\n")
