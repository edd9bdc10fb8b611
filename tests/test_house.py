"""Tests the rules of the package's layout: imports between folders, lengths of files and functions, use of JAX options.

`python tests/test_house.py` prints the measured numbers and every violation of a rule; its exit code is 1 if there is
one. `docs/architecture.md` says what the folders are for. The rules read the source (AST, grimp), so that code without
tests is checked too.
"""

from __future__ import annotations

import ast
import os
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
PACKAGE = ROOT / "pilot_jax"
MOST_LINES, MEDIAN_LINES, MOST_SHARE = 350, 140, 0.20  # longest file, median file, a folder's share of all lines
MOST_FUNCTION_LINES, MOST_PARAMETERS = 45, 7
SHORT_FUNCTIONS = ("federation", "runs", "models")  # folders whose functions have these limits
DOCUMENTATION = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


# -- measurements ----------------------------------------------------------------------------------------------------


@cache
def sources() -> dict[str, str]:
    """Returns the text of each file by its path inside the package, such as `federation/client.py`."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {file.relative_to(PACKAGE).as_posix(): file.read_text(encoding="utf-8") for file in files}


@cache
def tree(path: str) -> ast.Module:
    return ast.parse(sources()[path], path)


@cache
def lines() -> dict[str, int]:
    return {path: text.count("\n") for path, text in sources().items()}


@cache
def imports() -> list[tuple[str, str]]:
    """Returns (importer, imported) for every import inside the package, also in functions and under TYPE_CHECKING."""
    graph = grimp.build_graph("pilot_jax", cache_dir=None)
    return sorted((importer, imported) for importer in graph.modules
                  for imported in graph.find_modules_directly_imported_by(importer))


def file_of(module: str) -> str:
    path = module.removeprefix("pilot_jax").lstrip(".").replace(".", "/")
    return f"{path}.py" if f"{path}.py" in sources() else f"{path}/__init__.py".lstrip("/")


def circles() -> list[list[str]]:
    """Returns the groups of files that import each other in a circle."""
    names = sorted({file_of(module) for pair in imports() for module in pair})
    number = {name: i for i, name in enumerate(names)}
    pairs = [(number[file_of(a)], number[file_of(b)]) for a, b in imports()]
    graph = coo_array(([1] * len(pairs), tuple(zip(*pairs, strict=True))), shape=(len(names), len(names)))
    _, label = connected_components(graph.tocsr(), connection="strong")
    groups: dict[int, list[str]] = {}
    for name, group in zip(names, label, strict=True):
        groups.setdefault(int(group), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def rooms() -> dict[str, int]:
    """Returns the number of lines of each top-level folder, its subfolders included, the largest first."""
    total: dict[str, int] = {}
    for path, count in lines().items():
        if "/" in path:
            total[path.split("/")[0]] = total.get(path.split("/")[0], 0) + count
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def median_file() -> float:
    """Returns the median length of a file, without `__init__.py` files, many of which only have a docstring."""
    return statistics.median(count for path, count in lines().items() if not path.endswith("__init__.py"))


def functions(path: str) -> Iterator[tuple[str, int, int]]:
    """Returns (name, lines, parameters) of every function and method, also of functions inside others.

    Lines are counted from `def` to the end, with docstring and inner functions and without decorators. All parameters
    of `inspect.signature` count: `self` and `cls` too, and `*args` and `**kwargs` as one each. Methods that `dataclass`
    generates are not counted.
    """
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            yield node.name, node.end_lineno - node.lineno + 1, sum(one is not None for one in parameters)


def nodes(path: str) -> list[ast.AST]:
    """Returns all nodes with a line number, in the order of the text."""
    placed = [node for node in ast.walk(tree(path)) if hasattr(node, "lineno")]
    return sorted(placed, key=lambda node: (node.lineno, node.col_offset))


def dotted(node: ast.AST) -> str:
    """Returns "a.b.c" for a chain of attributes that begins with a name, and "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def where(path: str, node: ast.AST, what: str) -> str:
    return f"{path}:{node.lineno}: {what}"


def imported_names(path: str) -> Iterator[tuple[ast.AST, str]]:
    """Returns every module or name that a file imports, such as `threading` or `concurrent.futures.Future`."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)


# -- rules: each returns its violations, one line for each place -------------------------------------------------------


def import_contracts() -> list[str]:
    """The import contracts of `pyproject.toml` hold: layers, no circle of folders, no import of `testing`, `torch`."""
    run = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"NO_COLOR": "1", "COLUMNS": "160"})
    broken = [line.strip() for line in done.stdout.splitlines()
              if re.search(r" BROKEN$|^- ?pilot_jax\..*->|is not allowed to import|^- \.|configured", line.strip())]
    return [] if done.returncode == 0 else broken or [done.stdout[-2000:] + done.stderr[-2000:]]


def no_circle_of_files() -> list[str]:
    return [" ⇄ ".join(group) for group in circles()]


def no_import_by_name() -> list[str]:
    """Only two files import by a name in a string, which import contracts cannot see. `pilot_jax/__init__.py` imports
    its public names on first use, and `config/` imports the strategies, whose files register their config sections."""
    allowed = {("config", "pilot_jax.federation.strategies")}
    found = []
    for path in (path for path in sources() if path != "__init__.py"):
        for node in nodes(path):
            if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
                name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
                if str(name).startswith("pilot_jax") and (re.split(r"[/.]", path)[0], name) not in allowed:
                    found.append(where(path, node, f"imports {name!r}"))
    return found


def no_folder_is_too_large() -> list[str]:
    whole = sum(lines().values())
    return [f"{room}/ has {count} of {whole} lines, {count / whole:.1%}" for room, count in rooms().items()
            if count > MOST_SHARE * whole]


def no_file_is_too_long() -> list[str]:
    return [f"{path} has {count} lines" for path, count in lines().items() if count > MOST_LINES]


def the_median_file_is_short() -> list[str]:
    return [] if median_file() <= MEDIAN_LINES else [f"the median file has {median_file():.0f} lines"]


def functions_are_short() -> list[str]:
    """Functions have at most 45 lines and 7 parameters; `functions` says how they are counted."""
    return [f"{path}: {name} has {length} lines and {parameters} parameters"
            for path in sources() if path.split("/")[0] in SHORT_FUNCTIONS
            for name, length, parameters in functions(path)
            if length > MOST_FUNCTION_LINES or parameters > MOST_PARAMETERS]


def one_file_reads_the_config() -> list[str]:
    """Only `runs/prepare.py` reads a section of a whole `Config`; all others are given the section or its values.

    Found are `config.<section>` and `<anything>.config.<section>`, and the same with a parameter that is annotated with
    `Config`, or with a name that one of these was assigned to.
    """
    from pilot_jax.config import Config

    found = []
    for path in sources():
        if path == "runs/prepare.py" or path.split("/")[0] in ("config", "config.py"):
            continue
        whole = {"config"}
        for node in nodes(path):
            if isinstance(node, ast.arg) and node.annotation and re.search(r"\bConfig\b", ast.unparse(node.annotation)):
                whole.add(node.arg)
            if isinstance(node, ast.Assign) and dotted(node.value).split(".")[-1] == "config":
                whole |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and node.attr in Config.model_fields:
                of = node.value
                name = of.id if isinstance(of, ast.Name) else f".{of.attr}" if isinstance(of, ast.Attribute) else ""
                found += [where(path, node, ast.unparse(node))] * (name in whole | {".config"})
    return found


def jax_is_told_in_one_place() -> list[str]:
    """Only `parallel/devices.py` uses `jax.config` and the variable `XLA_FLAGS`. Messages may name the variable."""
    found = []
    for path in sources():
        if path == "parallel/devices.py":
            continue
        found += [where(path, node, name) for node, name in imported_names(path)
                  if name == "jax.config" or name.startswith("jax.config.")]
        for node in nodes(path):
            if isinstance(node, ast.Constant) and node.value == "XLA_FLAGS":
                found.append(where(path, node, "XLA_FLAGS"))
            elif isinstance(node, ast.Attribute) and dotted(node) == "jax.config":
                found.append(where(path, node, ast.unparse(node)))
    return found


def the_platform_is_asked_in_one_place() -> list[str]:
    """Only `parallel/devices.py` calls `jax.default_backend`, and only it and `kernels/` call its `platform()`, so that
    one place decides what each backend gets."""
    found = []
    for path in sources():
        if path == "parallel/devices.py":
            continue
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and node.attr == "default_backend":
                found.append(where(path, node, ast.unparse(node)))
            elif isinstance(node, ast.Call) and re.fullmatch(r"(devices\.)?platform", dotted(node.func)):
                found += [where(path, node, "platform()")] * (not path.startswith("kernels/"))
    return found


FILES = {"open", "read_text", "write_text", "read_bytes", "write_bytes", "mkdir", "unlink", "rename", "touch", "rmtree",
         "memmap", "savez", "fromfile", "tofile"}  # called as a function or as a method


def the_federation_touches_nothing_outside() -> list[str]:
    """`federation/` opens no file, reads no environment variable, and starts threads only in `executor.py`. Rows on
    disk are read and written by `pilot_jax.storage`."""
    found = []
    for path in (path for path in sources() if path.startswith("federation/")):
        for node in nodes(path):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else dotted(node.func)
                if name in FILES or dotted(node.func) in ("np.save", "np.load", "numpy.save", "numpy.load"):
                    found.append(where(path, node, f"{ast.unparse(node.func)}(…)"))
            elif isinstance(node, ast.Attribute) and dotted(node) in ("os.environ", "os.getenv"):
                found.append(where(path, node, dotted(node)))
        for node, name in imported_names(path):
            threads = re.match(r"(threading|concurrent|multiprocessing|asyncio)\b", name)
            if name in ("os.environ", "os.getenv") or (threads and path != "federation/executor.py"):
                found.append(where(path, node, name))
    return found


def every_folder_says_what_it_holds() -> list[str]:
    """Each folder with Python files has an `__init__.py` that begins with a docstring."""
    folders = sorted({path.rsplit("/", 1)[0] for path in sources() if "/" in path})
    return [f"{folder}/__init__.py" for folder in folders
            if f"{folder}/__init__.py" not in sources() or not ast.get_docstring(tree(f"{folder}/__init__.py"))]


def strategy_classes() -> set[str]:
    """Returns the names of all strategy classes, which inherit from `Strategy` directly or through other classes."""
    bases = {node.name: {dotted(base).split(".")[-1] for base in node.bases}
             for path in sources() if path.startswith("federation/strategies/")
             for node in nodes(path) if isinstance(node, ast.ClassDef)}
    found: set[str] = {"Strategy"}
    while more := {name for name, parents in bases.items() if parents & found} - found:
        found |= more
    return found - {"Strategy"}


def a_strategy_is_one_file() -> list[str]:
    """No file outside `federation/strategies/` names a strategy's class or imports its file, so that a new strategy
    changes no other folder. (`base`, which is not a strategy, and the folder's functions may be imported.)"""
    package, classes = "pilot_jax.federation.strategies", strategy_classes()
    found = []
    for path in (path for path in sources() if not path.startswith("federation/strategies/")):
        for node, name in imported_names(path):
            inside = name.removeprefix(f"{package}.") if name.startswith(f"{package}.") else ""
            if inside and inside.split(".")[0] != "base" and (
                    "." in inside or inside in classes or f"federation/strategies/{inside}.py" in sources()):
                found.append(where(path, node, f"imports {name}"))
        found += [where(path, node, f"{node.value!r}") for node in nodes(path)
                  if isinstance(node, ast.Constant) and isinstance(node.value, str)
                  and re.fullmatch(re.escape(package) + r"\.(?!base\b)\w+[.:\w]*", node.value)]
    return found


def the_documentation_names_files_that_exist() -> list[str]:
    """Every `….py` and every `pilot_jax/…` in README, CONTRIBUTING and docs exists. Files of the package may be named
    without `pilot_jax/`, and all Python files of package and tests without their folder."""
    known = {file.relative_to(base).as_posix() for base in (ROOT, PACKAGE)
             for file in base.rglob("*") if not {".venv", ".git", "build"} & set(file.parts)}
    known |= {file.name for file in (*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"))}
    found = []
    for page in DOCUMENTATION:
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            for name in re.findall(r"`((?:pilot_jax/)?[\w/]+\.py|pilot_jax/[\w/.]+)(?:[`:]| )", line):
                if name.rstrip("/") not in known and not name.startswith("mine"):
                    found.append(f"{page.relative_to(ROOT)}:{number}: {name}")
    return found


def the_documentation_draws_the_contracts_layers() -> list[str]:
    """The drawing in `docs/architecture.md` has the layers of `pyproject.toml`, in the same order."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    layers = next(one["layers"] for one in tools["importlinter"]["contracts"] if one["type"] == "layers")
    expected = [layer for layer in layers if layer not in ("testing | torch", "__main__")]
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = [line.split("  ")[0].strip() for line in re.search(r"```text\n(.*?)```", page, re.S)[1].splitlines()]
    return [] if drawn == expected else [f"docs/architecture.md draws {drawn}, pyproject.toml has {expected}"]


RULES: list[Callable[[], list[str]]] = [
    import_contracts, no_circle_of_files, no_import_by_name, no_folder_is_too_large, no_file_is_too_long,
    the_median_file_is_short, functions_are_short, one_file_reads_the_config, jax_is_told_in_one_place,
    the_platform_is_asked_in_one_place, the_federation_touches_nothing_outside, every_folder_says_what_it_holds,
    a_strategy_is_one_file, the_documentation_names_files_that_exist, the_documentation_draws_the_contracts_layers,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule):
    broken = rule()
    assert not broken, f"{rule.__name__}: {len(broken)}\n" + "\n".join(broken)


BREAKS = [
    (no_import_by_name, "federation", "importlib.import_module('pilot_jax.runs.simulate')"),
    (functions_are_short, "runs", "def f(self, a, b, c, d, *e, g, **h): pass"),
    (functions_are_short, "models", "def f():\n" + "    pass\n" * MOST_FUNCTION_LINES),
    (one_file_reads_the_config, "compare", "steps = setup.config.federation.local_steps"),
    (one_file_reads_the_config, "report", "def f(whole: Config | None): return whole.train"),
    (one_file_reads_the_config, "runs", "c = run.config\nprint(c.model)"),
    (jax_is_told_in_one_place, "runs", "jax.config.update('jax_enable_x64', True)"),
    (jax_is_told_in_one_place, "cli", "os.environ['XLA_FLAGS'] = ''"),
    (the_platform_is_asked_in_one_place, "kernels", "jax.default_backend()"),
    (the_platform_is_asked_in_one_place, "models", "devices.platform()"),
    (the_federation_touches_nothing_outside, "federation", "open('x')"),
    (the_federation_touches_nothing_outside, "federation", "path.read_text()"),
    (the_federation_touches_nothing_outside, "federation", "os.environ['HOME']"),
    (the_federation_touches_nothing_outside, "federation/strategies", "from concurrent.futures import Future"),
    (every_folder_says_what_it_holds, "new", ""),
    (a_strategy_is_one_file, "compare", "from pilot_jax.federation.strategies.pilot import Pilot"),
    (a_strategy_is_one_file, "compare", "from pilot_jax.federation.strategies import scaffold"),
    (a_strategy_is_one_file, "runs", "name = 'pilot_jax.federation.strategies.pilot:Pilot'"),
]


@pytest.mark.parametrize(("number", "rule", "folder", "text"), [(i, *case) for i, case in enumerate(BREAKS)])
def test_a_rule_finds_what_breaks_it(number, rule, folder, text, monkeypatch):
    """A new file with `text` in `folder` is reported, and nothing else that was not reported before."""
    before, path = rule(), f"{folder}/_broken_{number}.py"
    every = {**sources(), path: text}
    monkeypatch.setattr(sys.modules[__name__], "sources", lambda: every)
    new = [line for line in rule() if line not in before]
    assert len(new) == 1 and (path in new[0] or rule is every_folder_says_what_it_holds)


def numbers() -> str:
    """Returns the measured numbers as text."""
    whole, longest = sum(lines().values()), max(lines(), key=lines().__getitem__)
    parts = [f"{whole} lines in {len(lines())} files; median file {median_file():.0f}, longest {longest} "
             f"({lines()[longest]}); {len(imports())} imports inside the package"]
    parts += [f"  {room + '/':<14}{count:>6} lines  {count / whole:6.1%}" for room, count in rooms().items()]
    inside = sum(count for path, count in lines().items() if path.startswith("federation/strategies/"))
    parts.append(f"  (of federation/ {inside} lines, {inside / whole:.1%}, are strategies/)")
    loose = sum(count for path, count in lines().items() if "/" not in path)
    parts.append(f"  {'(no folder)':<14}{loose:>6} lines  {loose / whole:6.1%}")
    for room in SHORT_FUNCTIONS:
        all_of_it = [(length, parameters, f"{path}: {name}") for path in sources() if path.split("/")[0] == room
                     for name, length, parameters in functions(path)]
        if all_of_it:
            length, _, name = max(all_of_it)
            _, parameters, other = max(all_of_it, key=lambda one: one[1])
            parts.append(f"  {room}/: longest function {length} lines ({name}); most parameters {parameters} ({other})")
    return "\n".join(parts)


if __name__ == "__main__":
    print(numbers())
    failed = False
    for rule in RULES:
        broken = rule()
        failed = failed or bool(broken)
        print(f"\n{'broken' if broken else 'holds '}  {rule.__name__}" + "".join(f"\n    {line}" for line in broken))
    sys.exit(failed)
