"""The command `deploy`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pilot_jax.cli.options import ConfigPath, Overrides, read_config


def deploy(config: ConfigPath, out: Annotated[Path, typer.Argument(help="New folder for the app.")],
           clients: Annotated[Path | None, typer.Option(
               help="YAML file of the clients: each one's task, number of training samples and, if its node is "
                    "authenticated, public key. Default: those of the data at data.path.")] = None,
           overrides: Overrides = None) -> None:
    """Write a config as an app of Flower, whose clients train on machines of their own."""
    from pilot_jax.data.roster import read_roster
    from pilot_jax.deploy.glue import write_app
    from pilot_jax.runs.roster import roster_here

    settings = read_config(config, overrides)
    write_app(out, settings, roster_here(settings) if clients is None else read_roster(clients))
    typer.echo(f"Wrote {out}. {out / 'README.md'} has the commands for the server and the clients.")
