"""The commands `schema`, `roles` and `plan`, which describe a config, and `runs` and `verify`; none loads weights."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pilot_jax.cli.options import AsJson, ConfigPath, Overrides, RunPath, StrategyName, Use, check_choice, read_config
from pilot_jax.cli.tables import print_plan, printable
from pilot_jax.errors import InputError
from pilot_jax.words import counted

if TYPE_CHECKING:
    from pilot_jax.config import Config


def schema() -> None:
    """Print the JSON schema of configs, with which editors can check them: pilot-jax schema > schema.json."""
    from pilot_jax.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))


def roles(config: ConfigPath, overrides: Overrides = None, strategy: StrategyName = None,
          as_json: AsJson = False) -> None:
    """Print which parameters are trained, frozen, uploaded and aggregated, and their sizes. No weights are loaded."""
    from pilot_jax.planning.ownership import ownership_table

    rows = ownership_table(read_config(config, overrides, strategy))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Who owns which parameter (per client; bytes as float32)")
    for column in rows[0]:
        table.add_column(column, justify="right" if column in ("parameters", "bytes") else "left")
    for entry in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else escape(v) for v in entry.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def plan(config: ConfigPath, overrides: Overrides = None, strategy: StrategyName = None, use: Use = None,
         samples: Annotated[int, typer.Option(
             min=1, help="Number of training samples per client to assume if the data do not exist.")] = 1000,
         tasks: Annotated[int, typer.Option(
             min=1, help="Number of tasks to assume if the data do not exist.")] = 3,
         text_tokens: Annotated[int, typer.Option(
             min=8, help="Number of text tokens of the longest sample to assume if data or tokenizer do not exist."
         )] = 128,
         lower: Annotated[bool, typer.Option(
             help="Also lower every program for the config's mesh, to find errors before a run.")] = False,
         platform: Annotated[str, typer.Option(
             help="With --lower: cpu, cuda or tpu, which this machine need not have. Default: this machine's platform."
         )] = "",
         device: Annotated[str, typer.Option(
             help="Device for which remat, client_chunk and attention are chosen where they are auto, and whose memory "
             "must be enough: 16gb, 24gb, 80gb or 141gb (GPUs), v5e or v6e (TPU cores). Default: this machine's, if "
             "something is auto.")] = "",
         as_json: AsJson = False) -> None:
    """Print memory per device, FLOPs and bytes per round that a run will need. No weights are loaded."""
    from pilot_jax.planning.estimate import make_plan
    from pilot_jax.runs.prepare import split_cpu_for

    if platform:
        check_choice("--platform", platform, "cpu", "cuda", "tpu")
    settings = read_config(config, overrides, strategy)
    if lower:
        split_cpu_for(settings)  # JAX then has as many CPU devices as the mesh, of any size, needs
    assumed = {"samples": samples, "tasks": tasks, "text_tokens": text_tokens}
    settings, line = _chosen(settings, device, assumed)
    result = make_plan(settings, **assumed) | ({"choices": line} if line else {})
    if lower:
        from pilot_jax.planning.lowering import programs

        result["lowered"] = {name: len(program.export(platform).mlir_module_serialized if platform
                                       else program.lower().as_text())
                             for name, program in programs(settings, **assumed).items()}
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    print_plan(result)


def _chosen(config: Config, device: str, assumed: dict[str, int]) -> tuple[Config, str]:
    """Returns the config with its choices for a device made, and the line about them; "" if there is no choice."""
    from pilot_jax.planning.choices import DEVICES, chosen, this_device
    from pilot_jax.runs.prepare import leaves_choices

    if device:
        check_choice("--device", device, *DEVICES)
    elif not leaves_choices(config):
        return config, ""
    return chosen(config, DEVICES[device] if device else this_device(), **assumed)


def runs(folder: Annotated[Path, typer.Argument(help="Folder with run directories.")] = Path("runs"),
         as_json: AsJson = False) -> None:
    """List the runs in a folder, newest first: strategy, score, state and age."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from pilot_jax.runs.listing import list_runs

    found = list_runs(folder)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(run) for run in found], indent=1))
        return
    if not found:
        typer.echo(f"No runs in {printable(str(folder))}.")
        return
    table = Table()
    for column in ("run", "strategy", "score", "state", "age"):
        table.add_column(column, overflow="fold", justify="right" if column in ("score", "age") else "left")
    for run in found:
        table.add_row(escape(printable(run.folder)), escape(run.strategy),
                      "–" if run.score is None else f"{run.score:.3f}", run.state, _age(run.seconds))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _age(seconds: float) -> str:
    """Returns a duration in its largest unit, as "3 h"."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def verify(run_dir: RunPath, as_json: AsJson = False) -> None:
    """Check the files of a run directory, snapshots included, against the checksums of what the run has written."""
    from pilot_jax.runs.verify import verify_run

    found = verify_run(run_dir)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(found), indent=1))
    else:
        whole = counted(len(found.whole), "file or snapshot", "files and snapshots")
        typer.echo(f"{'finished' if found.ended else 'unfinished'} run, {whole} as written, "
                   f"{len(found.unknown)} of which nothing is known")
        for name in found.unknown[:20]:
            typer.echo(f"unknown: {printable(name)}")
    if found.damaged:
        raise InputError(f"{run_dir}: {len(found.damaged)} damaged:\n  " + "\n  ".join(
            f"{name}: {what}" for name, what in found.damaged.items()) + "\nPut back copies of them.")
