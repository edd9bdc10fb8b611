"""The commands `compare` and `report`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pilot_jax.cli.options import (
    AsJson,
    ConfigPath,
    Overrides,
    RunStrategy,
    Use,
    check_choice,
    read_config,
    with_choices,
)
from pilot_jax.errors import InputError
from pilot_jax.files import path_part
from pilot_jax.words import separated

if TYPE_CHECKING:
    from pilot_jax.compare.runner import Options
    from pilot_jax.compare.variants import Variant
    from pilot_jax.config import Config


def compare(config: ConfigPath,
            strategies: Annotated[str, typer.Option(
                help="Variants to compare, separated by commas. Each is a strategy's name, a group (all, ablations, "
                     "ata), an ablation such as pilot-text_mean, or module:Class for a strategy of your own. Append "
                     "+key=value to change the config of a variant, with key as in --set.")],
            seeds: Annotated[int, typer.Option(min=1, help="Number of seeds per variant; they train together.")] = 3,
            rates: Annotated[str, typer.Option(
                help="Factors on the learning rates, such as 0.1,0.3,1. Each strategy gets the factor with its best "
                     "validation score; while that is the largest or smallest, up to three beyond it are tried. "
                     "Default: the config's learning rates.")] = "",
            split: Annotated[str, typer.Option(help="Split that is scored: test or validation.")] = "test",
            vary: Annotated[str, typer.Option(
                help="key=v1,v2,… with key as in --set: one comparison for each value, in separate folders, and one "
                     "table of all.")] = "",
            against: Annotated[str, typer.Option(
                help="Variants to compare the others with, separated by commas. Default: pilot, local and fedavg_ft, "
                     "if they are among --strategies.")] = "",
            margin: Annotated[float, typer.Option(
                help="Largest difference of scores that does not matter, for non-inferiority and equivalence. State it "
                     "before the scores are known.")] = 0.02,
            overrides: Overrides = None,
            out: Annotated[Path | None, typer.Option(
                help="Folder for results; finished variants in it are not run again, and those of other settings are "
                     "kept in folders `earlier`. Default: a folder in runs/, named after the config.")] = None,
            use: Use = None, as_json: AsJson = False) -> None:
    """Compare strategies and ablations over several seeds, on the same data, with paired differences to references."""
    from pilot_jax.cli.tables import print_comparison
    from pilot_jax.compare.runner import Options
    from pilot_jax.compare.variants import read_variants
    from pilot_jax.runs.prepare import split_cpu_for

    settings, variants = read_config(config, overrides), read_variants(strategies)
    key, values = _read_values(vary)
    varied = [read_config(config, [*(overrides or []), f"{key}={value}"]) for value in values]
    check_choice("--split", split, "test", "validation")
    if not 0 < margin < math.inf:
        raise InputError(f"--margin: {margin:g}, expected a number above 0.")
    listed = tuple(dict.fromkeys(name for name in separated(against) if name))
    options = Options(seeds, _read_factors(rates), split, margin=margin, against=listed)
    split_cpu_for(settings)
    folder = out or Path("runs") / f"compare-{config.stem}"
    folders = [folder / _folder_of(value) for value in values] or [folder]
    titles = [f"{key} = {value}" for value in values] or [""]
    done = _compare_each(list(zip(titles, varied or [settings], folders, strict=True)), variants, options, as_json)
    if values:
        from pilot_jax.compare.page import write_sweep

        text = write_sweep(key, values, done, folder)
        typer.echo(json.dumps(done, indent=1) if as_json else text)
    elif as_json:
        typer.echo(json.dumps(done[0], indent=1))
    else:
        print_comparison(done[0])
    typer.echo(f"Results: {folder}", err=as_json)


def _compare_each(comparisons: Sequence[tuple[str, Config, Path]], variants: Sequence[Variant], options: Options,
                  as_json: bool) -> list[dict[str, Any]]:
    """Runs comparisons (title, config, folder) one after another, and returns their results."""
    from pilot_jax.compare.runner import compare as run_comparison

    def say(text: str) -> None:
        typer.echo(text, err=as_json)

    done = []
    for title, config, folder in comparisons:
        if title:
            say(title)
        try:
            done.append(run_comparison(with_choices(config, say), variants, options, folder, say))
        except KeyboardInterrupt:
            typer.echo(f"\nInterrupted. Finished variants are in {folder}; give the same command again to go on.",
                       err=True)
            raise typer.Exit(130) from None
    return done


def _read_values(vary: str) -> tuple[str, list[str]]:
    """Returns the key and the values of --vary; no values if it is empty."""
    key, _, listed = vary.partition("=")
    values = [value for value in separated(listed) if value]
    if vary and not values:
        raise InputError(f"--vary: {vary!r}, expected section.key=v1,v2,… such as data.digits.train=60,240.")
    if key.strip() == "strategy.name":
        raise InputError("--vary: strategy.name is what --strategies chooses. List the strategies there.")
    return key, values


def _read_factors(rates: str) -> tuple[float, ...]:
    """Returns the factors of --rates."""
    try:
        factors = tuple(float(x) for x in rates.split(",") if x.strip())
    except ValueError:
        raise InputError(f"--rates: {rates!r}, expected numbers such as 0.1,0.3,1.") from None
    if any(not 0 < f < math.inf for f in factors):
        raise InputError(f"--rates: {rates!r}, factors must be above 0, and finite.")
    return factors


def _folder_of(value: str) -> str:
    """Returns a value of --vary as a folder name that cannot point out of the results' folder."""
    return path_part(value).replace("%2E", ".") if value.strip(".") else path_part(value)


def report(runs: Annotated[list[Path], typer.Argument(
               help="One or several run directories, or the folder or results.json of one comparison.")],
           out: Annotated[Path | None, typer.Option(
               help="HTML file. Default: report.html in the first run directory.")] = None,
           answers: Annotated[int, typer.Option(
               min=0, help="Number of right answers, and of others, shown per client. With 0 no model is loaded.")] = 2,
           questions: Annotated[int, typer.Option(
               min=0, help="Number of each client's test prompts that every model answers, to score each model on "
                           "every task. With 0 these scores are left out.")] = 8,
           asked: Annotated[int | None, typer.Option(min=0, hidden=True, help="Old name of --questions.")] = None,
           strategy: RunStrategy = None, use: Use = None) -> None:
    """Write an HTML page about runs (also unfinished ones) or about a comparison, and its figures as SVG files."""
    from pilot_jax.compare.page import is_comparison, write_comparison_report
    from pilot_jax.config import SystemConfig
    from pilot_jax.federation.strategies import use as use_strategy
    from pilot_jax.parallel.devices import split_cpu
    from pilot_jax.report.page import write_report
    from pilot_jax.words import counted

    comparisons = sum(map(is_comparison, runs))
    if comparisons and len(runs) > 1:
        raise InputError("report: a comparison has a page of its own. Give one comparison alone, or only runs.")
    if out is not None and (out.suffix.lower() not in (".html", ".htm") or out.is_dir()):
        raise InputError(f"--out: {out}, expected a file that ends in .html. Nothing was written.")
    split_cpu(SystemConfig())
    if strategy is not None:
        use_strategy(strategy)
    out = out or (runs[0].with_suffix(".html") if runs[0].is_file() else runs[0] / "report.html")
    page, *pictures = (write_comparison_report(runs[0], out) if comparisons
                       else write_report(runs, out, answers, questions if asked is None else asked))
    typer.echo(f"Report: {page}, and {counted(len(pictures), 'figure')} in {page.with_suffix('')}")
