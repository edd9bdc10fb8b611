"""Commands over several runs: compare, report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pilot_jax.cli.options import AsJson, ConfigPath, Overrides, RunStrategy, check_choice, read_config
from pilot_jax.errors import InputError

if TYPE_CHECKING:
    from pilot_jax.compare.runner import Options
    from pilot_jax.compare.variants import Variant
    from pilot_jax.config import Config


def compare(config: ConfigPath,
            strategies: Annotated[str, typer.Option(
                help="Comma-separated: strategies, groups (all, ablations, ata), pilot-<ablation>, "
                     "name+section.key=value; module:Class for one of your own.")],
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
    from pilot_jax.compare.runner import Options
    from pilot_jax.compare.tables import table
    from pilot_jax.compare.variants import read_variants
    from pilot_jax.runs.prepare import split_cpu_for

    settings, variants = read_config(config, overrides), read_variants(strategies)
    key, values = _read_values(vary)
    varied = [read_config(config, [*(overrides or []), f"{key}={value}"]) for value in values]
    check_choice("--split", split, "test", "validation")
    options = Options(seeds, _read_factors(rates), split)
    split_cpu_for(settings)
    folder = out or Path("runs") / f"compare-{config.stem}"
    folders = [folder / _folder_of(value) for value in values] or [folder]
    titles = [f"{key} = {value}" for value in values] or [""]
    done = _compare_each(list(zip(titles, varied or [settings], folders, strict=True)), variants, options, as_json)
    if values:
        from pilot_jax.compare.page import write_sweep

        text, result = write_sweep(key, values, done, folder), json.dumps(done, indent=1)
    else:
        text, result = table(done[0]), json.dumps(done[0], indent=1)
    typer.echo(result if as_json else text)
    typer.echo(f"Results: {folder}", err=as_json)


def _compare_each(comparisons: Sequence[tuple[str, Config, Path]], variants: Sequence[Variant], options: Options,
                  as_json: bool) -> list[dict[str, Any]]:
    """The results of each comparison (title, config, folder), one after another."""
    from pilot_jax.compare.runner import compare as run_comparison

    def say(text: str) -> None:
        typer.echo(text, err=as_json)

    done = []
    for title, config, folder in comparisons:
        if title:
            say(title)
        try:
            done.append(run_comparison(config, variants, options, folder, say))
        except KeyboardInterrupt:
            typer.echo(f"\nInterrupted. Finished variants are in {folder}; the same command goes on from there.",
                       err=True)
            raise typer.Exit(130) from None
    return done


def _read_values(vary: str) -> tuple[str, list[str]]:
    """The key and the values of --vary; no value where it is empty."""
    key, _, listed = vary.partition("=")
    values = [value.strip() for value in listed.split(",") if value.strip()]
    if vary and not values:
        raise InputError(f"--vary: {vary!r}, expected section.key=v1,v2,… such as data.digits.train=60,240.")
    return key, values


def _read_factors(rates: str) -> tuple[float, ...]:
    """The factors of --rates."""
    try:
        factors = tuple(float(x) for x in rates.split(",") if x.strip())
    except ValueError:
        raise InputError(f"--rates: {rates!r}, expected numbers such as 0.1,0.3,1.") from None
    if any(not f > 0 for f in factors):
        raise InputError(f"--rates: {rates!r}, factors must be above 0.")
    return factors


def _folder_of(value: str) -> str:
    """A value of --vary as a folder's name: no way out of the folder."""
    name = value.replace("/", "_")
    return name if name.strip(".") else name.replace(".", "_")


def report(runs: Annotated[list[Path], typer.Argument(
               help="Run directories, several side by side; or a comparison's folder or results.json.")],
           out: Annotated[Path | None, typer.Option(help="The page; default report.html in the first of them.")] = None,
           answers: Annotated[int, typer.Option(
               min=0, help="Answers shown of each task; 0: no model is loaded.")] = 2,
           prompts: Annotated[int, typer.Option(
               "--asked", min=0,
               help="Of each client's prompts, how many every model answers, for what each can do.")] = 8,
           strategy: RunStrategy = None) -> None:
    """One HTML page of runs, finished or not, or of what `compare` wrote, and every figure as PNG beside it."""
    from pilot_jax.compare.page import is_comparison, write_comparison_report
    from pilot_jax.config import SystemConfig
    from pilot_jax.federation.strategies import use
    from pilot_jax.parallel.devices import split_cpu
    from pilot_jax.report.page import write_report

    comparisons = sum(map(is_comparison, runs))
    if comparisons and len(runs) > 1:
        raise InputError("report: a comparison has a page of its own. Give one, or runs alone.")
    split_cpu(SystemConfig())
    if strategy is not None:
        use(strategy)
    out = out or (runs[0].with_suffix(".html") if runs[0].is_file() else runs[0] / "report.html")
    page, *pictures = (write_comparison_report(runs[0], out) if comparisons
                       else write_report(runs, out, answers, prompts))
    typer.echo(f"{page}, and {len(pictures)} figures in {page.with_suffix('')}")
