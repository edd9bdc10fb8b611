"""Commands in README and docs: each can be given as it stands; and is run here, elsewhere, or not, with the reason."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from conftest import write_checkpoint

from pilot_jax import cli
from pilot_jax.compare import read_variants
from pilot_jax.config import load_config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SMALL = ["federation.rounds=1", "federation.local_steps=1", "train.batch_size=2", "eval.max_new_tokens=2",
         "eval.batch_size=2"]
DIGITS = ["data.digits.train=4", "data.digits.validation=2", "data.digits.test=2"]


def in_code(text: str) -> list[str]:
    """Commands in fenced sh blocks, a line each, and in backticks, where they say more than a name."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S)
             for line in block.replace("\\\n", "").splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += re.findall(r"`((?:pilot-jax|make|python|pip install) [^`]+)`", prose)
    lines = [re.sub(r"\s+", " ", line.split("  #")[0].split("# ")[0]).strip() for line in lines]
    return [line for line in lines if line]


def in_comments(text: str) -> list[str]:
    """The command with which a config opens."""
    head = re.sub(r"\\\n#", "", "".join(line + "\n" for line in text.splitlines() if line.startswith("#")))
    lines = re.findall(r"^#  .*?(pilot-jax .*)", head, re.M)
    return [re.sub(r"\s+", " ", line.split("  (")[0]).strip() for line in lines]


CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
COMMANDS = sorted({(page.name, line) for page in PAGES for line in in_code(page.read_text(encoding="utf-8"))}
                  | {(page.name, line) for page in CONFIGS for line in in_comments(page.read_text(encoding="utf-8"))})
# Why a command is not run by `test_a_reader_goes_through_them`, and what stands for it.
NOT_RUN = [
    (r"make (quickstart|test|bench|fuzz|test-long|lint|notebooks|docs|types)", "targets: CI is one of them; minutes"),
    (r"pip install|python -m pip", "installs packages; CI's own set-up does"),
    (r"python benchmarks/", "minutes to hours; tests/test_docs.py looks whether they take these options"),
    (r"pilot-jax compare", "hours; tests/test_compare.py runs small ones. Parsed here, with its configs and names"),
    (r"pilot-jax run configs/scale_1024.yaml", "minutes; tests/test_store.py runs a population on disk"),
    (r"pilot-jax (run configs/llava15_7b(_tpu)?.yaml .*(--distributed|my_data/$|=DIR$)|.*--coordinator)",
     "needs a 7B checkpoint or several hosts; test_hosts.py and test_own_data.py run them small"),
    (r"pilot-jax data check my_data/ --model models/llava", "the README's, with more options"),
    (r"pilot-jax (plan my.yaml|run my.yaml)", "the reader's own config"),
    (r"pilot-jax run configs/quickstart.yaml --out runs/(mine --resume|quickstart)", "test_resume.py; below"),
    (r"python -c .import jax; print", "shows the reader's devices"),
    (r"pilot-jax plan (.*(--lower|fsdp)|configs/llava15_7b_tpu.yaml)", "tests/test_plan.py, at 7B"),
    (r"pilot-jax pretrain", "half an hour; tests/test_cli.py runs it short"),
    (r"pilot-jax run configs/scenario_a.yaml", "minutes; tests/test_privacy.py runs it small"),
    (r"pilot-jax --install-completion", "changes the shell of who runs it"),
    (r"[A-Z]+=", "a shell variable for the next line"),
]
RUN = {  # as documented: what is run, in a folder where my_data/, checkpoint and runs/mine are
    "pilot-jax data check my_data/ --model /path/to/llava-1.5-7b-hf": [],
    "pilot-jax plan configs/llava15_7b.yaml": ["model.path=checkpoint", "data.path=my_data"],
    "pilot-jax run configs/llava15_7b.yaml --set model.path=/path/to/llava-1.5-7b-hf --set data.path=my_data/ --out "
    "runs/mine": [*SMALL, "data.max_length=256", "data.template=vicuna_short", "model.dtype=float32",
                  "model.remat=false", "federation.clients=3", "data.partition=equal", "system.unroll=1"],
    "pilot-jax export runs/mine --client vqa_0 --out adapters/vqa_0": [],
    "pilot-jax roles configs/quickstart.yaml": [],
}


def arguments(line: str) -> list[str]:
    return shlex.split(line.split(" > ")[0].replace("$LOW", "").replace("$MID", "").replace("$C", "a=1")
                       .replace("$E", "a=1"))


def is_synopsis(line: str) -> bool:
    return bool(re.search(r"\b(CONFIG|RUN|OUT|DIR|PATH|FOLDER|HOST0|N|K|F|S)\b|…", line))


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_it_can_be_given(page, line):
    """The command exists, with these options; its config is there and takes these keys; its strategies are known."""
    first, *rest = arguments(line)
    if first == "python" and rest[0].startswith("benchmarks/"):
        source = (ROOT / rest[0]).read_text(encoding="utf-8")
        assert all(option in source for option in rest[1:] if option.startswith("--")), line
        return
    if first == "make":
        assert f"\n{rest[0]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
        return
    if first != "pilot-jax" or rest[0].startswith("--"):
        return
    group = typer.main.get_command(cli.app)
    command = group.get_command(None, rest[0])
    if command is not None and hasattr(command, "commands") and len(rest) > 1:
        command, rest = command.get_command(None, rest[1]), rest[1:]
    assert command is not None, line
    options = {name for parameter in command.params for name in parameter.opts}
    used = {word for word in re.findall(r"--[a-z][a-z-]*", line)}
    assert used <= options, (used - options, line)
    if is_synopsis(line) or all(word.startswith("-") for word in rest[1:]):  # a name, perhaps with options
        return
    context = command.make_context(rest[0], rest[1:], resilient_parsing=False)
    values = context.params
    if "config" in values and Path(values["config"]).parent.name == "configs" and rest[0] != "pretrain":
        load_config(ROOT / values["config"], list(values["overrides"] or []))
    if "strategies" in values:
        read_variants(values["strategies"])


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_opens_with_its_command_its_cost_and_its_result(file):
    text = file.read_text(encoding="utf-8")
    assert in_comments(text) and "# Cost: " in text and "Result: " in text


def test_each_is_run_or_says_why_not():
    listed = {line for _, line in COMMANDS if not is_synopsis(line) and set(line.split()[2:]) - {"check"}}
    silent = [line for line in sorted(listed) if line not in RUN
              and not any(re.match(pattern, line) for pattern, _ in NOT_RUN)
              and not any(line.startswith(known) for known in RUN)]
    assert not silent, "neither run here nor with a reason not to be:\n" + "\n".join(silent)
    assert set(RUN) <= listed, set(RUN) - listed


def test_a_reader_goes_through_them(tmp_path, monkeypatch, call):
    """In the order in which the README has them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    write_checkpoint(tmp_path / "checkpoint")
    assert call("data", "digits", "my_data", "--train", 4, "--validation", 2, "--test", 2)[0] == 0
    for line, changes in RUN.items():
        words = [w.replace("/path/to/llava-1.5-7b-hf", "checkpoint") for w in arguments(line)[1:]]
        if words[0] == "data":
            words += ["--template", "vicuna_short"]
        code, out, err = call(*words, *[x for change in changes for x in ("--set", change)])
        assert code == 0, (line, out[-500:], err[-1500:])
    assert call("report", "runs/mine", "--answers", 0, "--out", "page.html")[0] == 0
    assert (tmp_path / "adapters" / "vqa_0" / "adapter_model.safetensors").is_file()


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    small = [*SMALL, *DIGITS]
    scope: dict = {}
    exec(block.replace("])\nrun", f", *{small!r}])\nrun"), scope)
    assert scope["run"].summary["score_by_task"].keys() == {"caption", "ocr", "vqa"} and "model" in scope
