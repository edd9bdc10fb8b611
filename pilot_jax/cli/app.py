"""Collects all commands into one application, and sets its exit codes: 0 done, 1 failed run, 2 wrong input."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import typer

from pilot_jax.cli import comparisons, data, inspect, models
from pilot_jax.cli.run import run
from pilot_jax.cli.tables import printable
from pilot_jax.errors import InputError

app = typer.Typer(name="pilot-jax", no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Federated multimodal instruction tuning in JAX: Pilot, its baselines and its ablations.")
COMMANDS: tuple[Callable[..., None], ...] = (
    run, comparisons.report, inspect.schema, inspect.roles, inspect.plan, models.evaluate, comparisons.compare,
    models.generate, models.export, models.pretrain)
DATA_COMMANDS: tuple[Callable[..., None], ...] = (data.digits, data.check)
for command in COMMANDS:
    app.command()(command)
data_app = typer.Typer(no_args_is_help=True, help="Create or check data sets.")
app.add_typer(data_app, name="data")
for command in DATA_COMMANDS:
    data_app.command()(command)


def main() -> None:
    """Runs the command line. Wrong input ends it with one message and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        app()
    except InputError as error:
        typer.echo(f"Error: {printable(str(error))}", err=True)
        sys.exit(2)
