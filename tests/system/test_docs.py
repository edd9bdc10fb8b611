"""Tests the commands and code in README and docs: each command exists, and some test runs it or a reason is given."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import markdown
import pytest
import typer
from conftest import ROOT

from pilot_jax.cli.app import app
from pilot_jax.compare.variants import read_variants
from pilot_jax.config import known_keys, load_config

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SMALL = ["federation.rounds=1", "federation.local_steps=1", "train.batch_size=2", "eval.max_new_tokens=2",
         "eval.batch_size=2", "system.unroll=1"]
DIGITS = ["data.digits.train=4", "data.digits.validation=2", "data.digits.test=2"]


def in_code(text: str) -> list[str]:
    """Returns the commands in fenced sh blocks, one per line, and those in backticks with at least one argument."""
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S)
             for line in block.replace("\\\n", "").splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += re.findall(r"`((?:pilot-jax|make|python|pip install) [^`]+)`", prose)
    lines = [re.sub(r"\s+", " ", line.split("  #")[0].split("# ")[0]).strip() for line in lines]
    return [line for line in lines if line]


def in_comments(text: str) -> list[str]:
    """Returns the commands in the comment at the top of a config."""
    head = re.sub(r"\\\n#", "", "".join(line + "\n" for line in text.splitlines() if line.startswith("#")))
    lines = re.findall(r"^#  .*?(pilot-jax .*)", head, re.M)
    return [re.sub(r"\s+", " ", line.split("  (")[0]).strip() for line in lines]


CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
COMMANDS = sorted({(page.name, line) for page in PAGES for line in in_code(page.read_text(encoding="utf-8"))}
                  | {(page.name, line) for page in CONFIGS for line in in_comments(page.read_text(encoding="utf-8"))})
# By pattern of a command: the test that runs it at a small size, or the reason why no test does.
WHERE = [
    (r"(python configs/papers/convert.py|pilot-jax \w+ .*configs/papers)", "test_papers.py, on stand-ins of the data"),
    (r"pilot-jax (data check|plan|run configs/llava15_7b.yaml|export)", "test_own_data.py: the README's section"),
    (r"pilot-jax run configs/text_only.yaml", "test_text_only.py, on a tiny language model"),
    (r"pilot-jax plan .*(--lower|fsdp)", "test_estimate.py, at 7B"),
    (r"pilot-jax run configs/quickstart.yaml", "test_resume.py, test_cli.py; and from Python, below"),
    (r"pilot-jax (evaluate|generate|roles|data digits)", "test_cli.py"),
    (r"pilot-jax report", "test_report.py, and notebooks/04"),
    (r"pilot-jax compare", "test_compare.py; these would take hours"),
    (r"pilot-jax base", "test_base.py, downloads included, in make test-long"),
    (r"python -m pilot_jax.real.emoji_(tasks|build)", "test_emoji.py"),
    (r"python -m pilot_jax.real.scores", "test_pretrain.py, on a small base"),
    (r"pilot-jax run configs/real.yaml", "test_real.py, downloads included, in make test-long"),
    (r"pilot-jax data stamps", "test_stamps.py"),
    (r"pilot-jax pretrain", "test_cli.py, test_pretrain.py; these would take twelve minutes and an hour"),
    (r"pilot-jax run configs/scale_1024.yaml", "test_storage.py; this one would take minutes"),
    (r"pilot-jax run configs/scenario_a.yaml", "test_privacy.py; this one would take minutes"),
    (r"pilot-jax run configs/benchmark/digits.yaml", "test_halves.py runs the strategy; this one takes minutes"),
    (r"pilot-jax run (my.yaml|configs/llava15_7b_tpu.yaml)", "no test: a TPU, 7B weights, the reader's own config"),
    (r"pilot-jax run .*(--coordinator|--distributed)", "test_processes.py over gloo; --distributed needs a cluster"),
    (r"pilot-jax deploy", "test_app_folder.py, test_deployment.py"),
    (r"(flower-super\w+|flwr|ssh-keygen|export FLWR|python -m venv)", "test_deployment.py, on 127.0.0.1"),
    (r"make \w+|source |pip install|pip wheel|python -m pip", "no test: CI's own set-up does, or would take it hours"),
    (r"python benchmarks/", "no test: minutes to hours; below, whether they take these options"),
    (r"python -c .from pilot_jax.testing|python examples/deploy_demo.py --large", "no test: gigabytes, minutes"),
    (r"python -c .import jax; print", "no test: shows the reader's devices"),
    (r"pilot-jax --install-completion", "no test: changes the shell of who runs it"),
    (r"[A-Z]+=", "no test: a shell variable for the next line"),
]


def arguments(line: str) -> list[str]:
    return shlex.split(line.split(" > ")[0].replace("$LOW", "").replace("$MID", "").replace("$C", "a=1")
                       .replace("$E", "a=1"))


def is_synopsis(line: str) -> bool:
    return bool(re.search(r"\b(CONFIG|RUN|OUT|DIR|PATH|FOLDER|HOST0|N|K|F|S)\b|…", line))


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_it_can_be_given(page, line):
    """The command and its options exist, its config exists and has the given keys, and its strategies are known."""
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
    group = typer.main.get_command(app)
    command = group.get_command(None, rest[0])
    if command is not None and hasattr(command, "commands") and len(rest) > 1:
        command, rest = command.get_command(None, rest[1]), rest[1:]
    assert command is not None, line
    options = {name for parameter in command.params for name in parameter.opts}
    used = {word for word in re.findall(r"--[a-z][a-z-]*", line)}
    assert used <= options, (used - options, line)
    if is_synopsis(line) or all(word.startswith("-") for word in rest[1:]):  # mentioned without arguments
        return
    context = command.make_context(rest[0], rest[1:], resilient_parsing=False)
    values = context.params
    if "config" in values and Path(values["config"]).parts[0] == "configs" and rest[0] != "pretrain":
        load_config(ROOT / values["config"], list(values["overrides"] or []))
    if "strategies" in values:
        read_variants(values["strategies"])


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_opens_with_its_command_its_cost_and_its_result(file):
    text = file.read_text(encoding="utf-8")
    assert in_comments(text) and "# Cost: " in text and "Result: " in text


def test_each_is_run_or_says_why_not():
    listed = {line for _, line in COMMANDS if not is_synopsis(line) and set(line.split()[2:]) - {"check"}}
    silent = [line for line in sorted(listed) if not any(re.match(pattern, line) for pattern, _ in WHERE)]
    assert not silent, "no test runs, and no reason not to:\n" + "\n".join(silent)
    tests = {name for _, where in WHERE for name in re.findall(r"test_\w+\.py", where)}
    assert tests <= {file.name for file in (ROOT / "tests").rglob("test_*.py")}


@pytest.mark.slow
def test_the_site_builds(tmp_path):
    """With --strict, the build fails if a page, a link or a documented name is missing."""
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
                          cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    site = tmp_path / "site"
    pages = {page.relative_to(site).as_posix(): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert "Raises" in pages["api.html"] and "ata_weights" in pages["api.html"]
    assert '<span class="k">class</span>' in pages["tweaks.html"]  # code is highlighted
    assert pages["method.html"].count("<math") > 50
    for name, text in pages.items():
        # Nothing is loaded from elsewhere: no scripts, pictures, styles, fonts or frames.
        assert not re.search(r"""<(script|img|link|iframe)[^>]+(src|href)=["'](https?:)?//""", text), name
        assert "arithmatex" not in text and "<merror" not in text, name  # every formula has become MathML
    for file in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*['\"]?(https?:)?//", file.read_text(encoding="utf-8")), file


@pytest.mark.slow
def test_the_readmes_python_runs(tmp_path, monkeypatch):
    """The Python blocks of the README run one after another in one namespace, on a smaller federation."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert len(blocks) == 2 and all(sum(map(bool, block.splitlines())) <= 8 for block in blocks)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    code = "".join(blocks)
    small = code.replace("])\nrun", f", *{[*SMALL, *DIGITS]!r}])\nrun")
    assert small != code
    scope: dict = {}
    exec(small, scope)
    assert scope["run"].summary["score_by_task"].keys() == {"caption", "ocr", "vqa"} and "model" in scope
    assert scope["run"].summary["strategy"].endswith("Ring")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


MARKER = re.compile(r"( *)([-+*]|\d+[.)]|#+) ")


def without_code(text: str) -> list[str]:
    """The lines of a page; those in fenced code, comments of HTML and tables are empty."""
    text = re.sub(r"^```.*?^```|^<!--.*?-->", lambda found: "\n" * found[0].count("\n"), text, flags=re.M | re.S)
    return ["" if line.startswith("|") else line for line in text.splitlines()]


def list_items(text: str) -> tuple[int, list[str]]:
    """(number of list items, lines that Markdown takes for an item or a heading though they continue a paragraph).

    A list begins after an empty line; its items have one marker, - or a number, and one indentation.
    """
    items, wrong, before, now = 0, [], "", None
    for line in without_code(text):
        found = MARKER.match(line)
        kind = found and (found[1], "1." if found[2][0].isdigit() else found[2][0])
        if not line.strip():
            now = None
        elif kind and (kind[1] in "+*" or (before.strip() and kind != now)):
            wrong.append(line)
        elif kind and kind[1] != "#":
            items, now = items + 1, kind
        before = "" if kind and kind[1] == "#" else line
    return items, wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_a_line_of_prose_does_not_become_a_list_item(page):
    text = page.read_text(encoding="utf-8")
    items, wrong = list_items(text)
    assert not wrong, wrong
    assert markdown.markdown(text, extensions=["tables", "pymdownx.superfences"]).count("<li>") == items


@pytest.mark.parametrize(("text", "items", "wrong"), [
    ("a\n\n- b\n  c\n- d\n", 2, 0), ("gains\n+ 0.06\n", 0, 1), ("- gains\n  + 0.06\n", 1, 1), ("gains\n- 0.06\n", 0, 1),
    ("in\n3. of them\n", 0, 1), ("a\n# b\n", 0, 1), ("# a\n\n1. b\n2. c\n", 2, 0), ("```\n+ a\n```\n", 0, 0)])
def test_list_items_are_found(text, items, wrong):
    found = list_items(text)
    assert (found[0], len(found[1])) == (items, wrong)


def test_the_generated_pages_are_up_to_date():
    """commands.md and configuration.md are what the code says now."""
    done = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_is_on_the_page_of_commands():
    text, group = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), typer.main.get_command(app)
    commands = {name: command for name, command in group.commands.items() if not hasattr(command, "commands")}
    commands |= {f"{name} {inner}": command for name, outer in group.commands.items() if hasattr(outer, "commands")
                 for inner, command in outer.commands.items()}
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    assert sections.keys() == commands.keys()
    for name, command in commands.items():
        shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
        options = {option for parameter in shown for option in parameter.opts if option.startswith("--")}
        assert options == set(re.findall(r"^\| `(--[a-z-]+)`", sections[name], re.M)), name


def test_every_key_is_on_the_page_of_the_configuration():
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^\| `([a-z_.0-9]+)`", text, re.M))
    known = {key for key in known_keys() if not any(other.startswith(f"{key}.") for other in known_keys())}
    nested = ("federation.participation.", "train.clients.")  # keys of an entry of a list or of a mapping
    assert {key for key in known if not key.startswith(nested)} - shown <= {"strategy"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_pages_install_from_a_clone_and_name_only_documents_that_exist(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"""pip install [^`\n]*['" ]pilot[-_]jax(\[|['"`\s])""", text)  # it is on no package index
    assert not re.search(r"\b(pypi|pythonhosted|npmjs|anaconda)\.(org|com)\b", text)
    for name in re.findall(r"\]\((?!https?:)([^)#\s]+)[^)]*\)", text):
        assert (page.parent / name).exists(), name
    for name in re.findall(r"`([\w./-]+\.md)`", text):
        assert name == "README.md" or (ROOT / name).is_file() or (page.parent / name).is_file(), name


def said_in_code() -> str:
    """All string constants of the package, an f-string as one, with … in place of its values."""
    parts = []
    for file in sorted((ROOT / "pilot_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(node.value)
    return "\n".join(parts)


def test_the_messages_of_troubleshooting_are_those_of_the_code():
    """Of each message the parts between its values, which stand as … or as an example."""
    text, code = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), said_in_code()
    messages = re.findall(r"^- `([^`]+)`(?! \(from JAX\))", text, re.M)
    assert len(messages) > 8
    for message in messages:
        values = r"…|\d+|'[^']*'|\(…\)|data/\w+|\b[a-z]+\.batchsize|\bx\b|(?<=\.) "
        fragments = [part.strip() for part in re.split(values, message)]
        assert max(map(len, fragments)) >= 12, message
        assert [part for part in fragments if len(part) > 3 and part not in code] == [], message
