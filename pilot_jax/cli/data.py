"""The commands `data digits`, `data emoji`, `data stamps` and `data check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pilot_jax.cli.options import Overrides
from pilot_jax.cli.tables import printable
from pilot_jax.errors import InputError
from pilot_jax.words import counted, yaml_text


def digits(out: Annotated[Path, typer.Argument(help="New folder for data.json and the images.")],
           scenario: Annotated[str, typer.Option(
               help="a: 3 tasks with 3 clients each; b: 4 tasks with 5 clients each; c: 4 tasks with 3 clients each, "
               "in looks that no base has seen.")] = "a",
           look: Annotated[Literal["same", "own"], typer.Option(
               help="Whether a task's clients in scenario c have one look, or each its own.")] = "own",
           wording: Annotated[Literal["known", "shared", "half", "own"], typer.Option(
               help="Wordings of a task's clients in scenario c; the key data.digits.wording explains them.")] = "own",
           labels: Annotated[Literal["same", "own"], typer.Option(
               help="Digits in the training pictures of a task's clients in scenario c: all alike, or mostly a share "
               "of each client's own.")] = "same",
           train: Annotated[int, typer.Option(min=1, help="Number of training samples per client.")] = 480,
           validation: Annotated[int, typer.Option(min=1, help="Number of validation samples per client.")] = 16,
           test: Annotated[int, typer.Option(min=1, help="Number of test samples per client.")] = 48,
           seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes.")] = 0) -> None:
    """Write the embedded digit scenes as a LLaVA data set."""
    from pilot_jax.data.llava.reading import write_samples
    from pilot_jax.embedded.scenarios import SCENARIOS, clients_of, scene_samples

    if scenario not in SCENARIOS:
        raise InputError(f"--scenario: {scenario!r}, expected one of {', '.join(SCENARIOS)}.")
    if scenario != "c" and (look, wording, labels) != ("own", "own", "same"):
        raise InputError(f"--look, --wording and --labels have no effect in scenario {scenario}. Leave them out, or "
                         "give --scenario c.")
    specs = clients_of(scenario, (train, validation, test), look=look, wording=wording, labels=labels)
    count = write_samples(scene_samples(specs, seed), out)
    typer.echo(f"{counted(count, 'sample')} in {out / 'data.json'}, images in {out / 'images'}")


def emoji(out: Annotated[Path, typer.Argument(help="New folder for data.json and the images.")],
          tasks: Annotated[str, typer.Option(
              help="Tasks of the clients: kind, colour, describe, yesno, name.")] = "kind,colour,describe,yesno",
          styles: Annotated[str, typer.Option(
              help="Drawing styles of the clients; each task in each style is a client.")] = "noto,twemoji,fluent",
          train: Annotated[int, typer.Option(min=1, help="Number of training samples per client.")] = 48,
          validation: Annotated[int, typer.Option(min=1, help="Number of validation samples per client.")] = 16,
          test: Annotated[int, typer.Option(min=1, help="Number of test samples per client.")] = 48,
          seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of pictures.")] = 0) -> None:
    """Write the emoji pictures that ship, with questions about them, as a LLaVA data set."""
    from pilot_jax.config import parse_config
    from pilot_jax.data.llava.reading import write_samples
    from pilot_jax.real.emoji_tasks import emoji_samples

    own = {"tasks": tasks.split(","), "styles": styles.split(","), "train": train, "validation": validation,
           "test": test, "seed": seed}
    count = write_samples(emoji_samples(parse_config({"data": {"emoji": own}}, "data emoji").data.emoji), out)
    typer.echo(f"{counted(count, 'sample')} in {out / 'data.json'}, images in {out / 'images'}")


def stamps(folder: Annotated[Path, typer.Argument(
               help="Folder of Tux Paint's stamps; Debian's package tuxpaint-stamps-default installs "
                    "/usr/share/tuxpaint/stamps.")],
           out: Annotated[Path, typer.Argument(help="New folder for data.json and the images.")],
           side: Annotated[int, typer.Option(min=16, max=1024, help="Height and width of the images in pixels.")] = 112,
           ) -> None:
    """Write Tux Paint's stamps, pictures with sentences in six languages, as a LLaVA data set. They are under GPL-2."""
    from pilot_jax.data.llava.reading import write_samples
    from pilot_jax.real.stamps import stamp_samples

    count = write_samples(stamp_samples(folder, side), out)
    typer.echo(f"{counted(count, 'sample')} in {out / 'data.json'}, images in {out / 'images'}. The stamps are under "
               "the GPL-2.")


def check(path: Annotated[Path, typer.Argument(help="Data file or folder of data files.")],
          config_file: Annotated[Path | None, typer.Option(
              "--config", help="YAML config of the run, whose keys apply. Default: the default of every key.")] = None,
          overrides: Overrides = None,
          image_root: Annotated[Path | None, typer.Option(
              help="Folder that image paths are relative to: the key data.image_root.")] = None,
          model: Annotated[str | None, typer.Option(
              help="LLaVA directory, whose tokenizer measures lengths in tokens. Default: in characters, and samples "
                   "that are too long are not found.")] = None,
          template: Annotated[str | None, typer.Option(help="Conversation template: the key data.template.")] = None,
          max_length: Annotated[int | None, typer.Option(
              help="Number of tokens after which a run would cut a sample: the key data.max_length.")] = None,
          file_names: Annotated[str | None, typer.Option(
              help="What the names of data files stand for, if samples do not say it, task or client: the key "
                   "data.file_names.")] = None) -> None:
    """Read a data set as `run` would, images included, and report its counts, its lengths and all errors in it."""
    from pilot_jax.config import apply_overrides, load_config, parse_config
    from pilot_jax.runs.prepare import checked_data

    given = {"image_root": None if image_root is None else str(image_root), "template": template,
             "max_length": max_length, "file_names": file_names}
    settings = parse_config({}) if config_file is None else load_config(config_file)
    settings = apply_overrides(settings, [*(f"data.{key}={yaml_text(value)}" for key, value in given.items()
                                            if value is not None), *(overrides or [])])
    loaded = None
    if model is not None:
        from pilot_jax.models.pretrained import load

        loaded = load(model)
    report = checked_data(settings, path, loaded)
    for (task, client, split), count in report.counts.items():
        typer.echo(f"{task:<16} {client or '(no client)':<20} {split:<12} {count:>7}")
    for low, high, count in report.lengths:
        typer.echo(f"{low:>6} to {high:>6} {report.length_unit:<12} {count:>7}")
    for warning in report.warnings:
        typer.echo(printable(f"Warning: {warning}."))
    if report.errors:
        for error in report.errors[:20]:
            typer.echo(f"Error: {printable(error)}", err=True)
        more = f" ({len(report.errors) - 20} not shown)" if len(report.errors) > 20 else ""
        typer.echo(f"{counted(len(report.errors), 'error')}{more}", err=True)
        raise typer.Exit(2)
    typer.echo(f"{counted(sum(report.counts.values()), 'sample')}, all readable")
