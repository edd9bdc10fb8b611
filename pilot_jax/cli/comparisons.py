"""Commands over several runs: compare, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pilot_jax.cli.options import AsJson, ConfigPath, Overrides
from pilot_jax.errors import InputError


def compare(config: ConfigPath,
            strategies: Annotated[str, typer.Option(
                help="Comma-separated: strategies, groups (all, ablations, ata), pilot-<ablation>, "
                     "name+section.key=value.")],
            seeds: Annotated[int, typer.Option(min=1, help="Trained together, as more clients.")] = 3,
            rates: Annotated[str, typer.Option(
                help="Factors on the learning rates to choose from by validation score, for each strategy: 0.1,0.3,1. "
                     "Default: no tuning.")] = "",
            split: Annotated[str, typer.Option(help="Scored: test, or validation to choose by.")] = "test",
            vary: Annotated[str, typer.Option(
                help="section.key=v1,v2,…: one comparison for each value, in a folder of its own, and a table of all."
            )] = "",
            overrides: Overrides = None,
            out: Annotated[Path | None, typer.Option(help="Folder; what is done there is not done again.")] = None,
            as_json: AsJson = False) -> None:
    """Strategies and ablations × seeds, on the same data and steps: a table with paired differences to Pilot."""
    from pilot_jax.compare.page import table, write_sweep
    from pilot_jax.compare.runner import compare as run_comparison
    from pilot_jax.compare.variants import read_variants
    from pilot_jax.config import load_config
    from pilot_jax.parallel.devices import split_cpu

    settings, variants = load_config(config, overrides), read_variants(strategies)
    key, _, listed = vary.partition("=")
    values = [value.strip() for value in listed.split(",") if value.strip()]
    if vary and not values:
        raise InputError(f"--vary: {vary!r}, expected section.key=v1,v2,… such as data.digits.train=60,240.")
    varied = [load_config(config, [*(overrides or []), f"{key}={value}"]) for value in values]
    try:
        factors = [float(x) for x in rates.split(",") if x.strip()]
    except ValueError:
        raise InputError(f"--rates: {rates!r}, expected numbers such as 0.1,0.3,1.") from None
    if split not in ("test", "validation"):
        raise InputError(f"--split: {split!r}, expected test or validation.")
    if any(not f > 0 for f in factors):
        raise InputError(f"--rates: {rates!r}, factors must be above 0.")
    split_cpu(settings.system)
    folder = out or Path("runs") / f"compare-{config.stem}"

    def say(text: str) -> None:
        typer.echo(text, err=as_json)

    try:
        done = []
        for value, one in zip(values, varied, strict=True):
            say(f"{key} = {value}")
            done.append(run_comparison(one, variants, seeds, folder / _folder_of(value), factors=factors,
                                       split=split, say=say))
        results = {} if done else run_comparison(settings, variants, seeds, folder, factors=factors, split=split,
                                                 say=say)
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted. Finished variants are in {folder}; the same command goes on from there.", err=True)
        raise typer.Exit(130) from None
    shown = write_sweep(key, values, done, folder) if done else table(results)
    typer.echo(json.dumps(done or results, indent=1) if as_json else shown)
    say(f"Results: {folder}")


def _folder_of(value: str) -> str:
    """A value of --vary as a folder's name: no way out of the folder."""
    name = value.replace("/", "_")
    return name if name.strip(".") else name.replace(".", "_")


def report(runs: Annotated[list[Path], typer.Argument(
               help="Run directories, several side by side; or a comparison's folder or results.json.")],
           out: Annotated[Path | None, typer.Option(help="The page; default report.html in the first of them.")] = None,
           answers: Annotated[int, typer.Option(
               min=0, help="Answers shown of each task; 0: no model is loaded, nothing asked.")] = 2,
           asked: Annotated[int, typer.Option(
               min=0, help="Of each client's prompts, how many every model answers, for what each can do.")] = 8
           ) -> None:
    """One HTML page of runs, finished or not, or of what `compare` wrote, and every figure as PNG beside it."""
    from pilot_jax.config import SystemConfig
    from pilot_jax.parallel.devices import split_cpu
    from pilot_jax.report.page import write_report

    split_cpu(SystemConfig())
    default = runs[0].with_suffix(".html") if runs[0].is_file() else runs[0] / "report.html"
    page, *pictures = write_report(runs, out or default, answers, asked)
    typer.echo(f"{page}, and {len(pictures)} figures in {page.with_suffix('')}")
