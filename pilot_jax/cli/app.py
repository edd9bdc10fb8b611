"""Collects all commands into one application, and sets its exit codes: 0 done, 1 failed run, 2 wrong input."""

from __future__ import annotations

import functools
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer

from pilot_jax import __version__
from pilot_jax.cli import comparisons, data, deploy, inspect, models, supervise
from pilot_jax.cli.run import run
from pilot_jax.cli.tables import printable
from pilot_jax.errors import InputError, is_wrong_path
from pilot_jax.models.checkpoints import library
from pilot_jax.parallel.allocator import use_one_arena

app = typer.Typer(name="pilot-jax", pretty_exceptions_enable=False)
COMMANDS: tuple[Callable[..., None], ...] = (
    run, inspect.runs, comparisons.report, inspect.schema, inspect.roles, inspect.plan, models.evaluate,
    comparisons.compare, models.generate, models.export, deploy.deploy, inspect.verify, models.base, models.pretrain)
DATA_COMMANDS: tuple[Callable[..., None], ...] = (data.digits, data.emoji, data.stamps, data.check)


def _interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """Returns the command such that Ctrl-C ends it with one line and exit code 130."""
    @functools.wraps(command)
    def wrapped(*args: Any, **options: Any) -> None:
        try:
            command(*args, **options)
        except KeyboardInterrupt:
            typer.echo("\nInterrupted.", err=True)
            raise typer.Exit(130) from None

    return wrapped


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pilot-jax {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def pilot_jax(context: typer.Context, version: Annotated[bool, typer.Option(
        "--version", callback=_show_version, is_eager=True, help="Print the version.")] = False) -> None:
    """Federated multimodal instruction tuning in JAX: Pilot, its baselines and its ablations."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for command in COMMANDS:
    app.command()(_interruptible(command))
data_app = typer.Typer(invoke_without_command=True)


@data_app.callback()
def _data(context: typer.Context) -> None:
    """Create or check data sets."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.add_typer(data_app, name="data")
for command in DATA_COMMANDS:
    data_app.command()(_interruptible(command))


def main() -> None:
    """Runs the command line. Every error ends it with one message: exit code 2 for wrong input, 1 for all others."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Hugging Face's libraries read it when they are imported. Nothing but this option needs the network.
    pushes = any(word.split("=")[0] == "--push-to-hub" for word in sys.argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "0" if pushes else "1")
    library.leave_out_torch()
    use_one_arena()
    _print_any_text()
    try:
        app()
    except SystemExit as end:
        if supervise.is_child() and end.code in (1, 2):
            _end(int(end.code))
        raise
    except InputError as error:
        _fail(f"Error: {error}", 2)
    except OSError as error:
        name = str(error.filename or "")
        where = f"{name[:300]}{'…' * (len(name) > 300)}: " if name else ""
        _fail(f"Error: {where}{error.strerror or error}. Check the path, its permissions and the free space.",
              2 if is_wrong_path(error) else 1)
    except MemoryError:
        _fail("Failed: not enough memory. `pilot-jax plan CONFIG` says how much a run needs.", 1)
    except Exception as error:
        _fail(f"Failed: {type(error).__name__}: {' '.join(str(error).split())[:500]}. This is an error of pilot_jax. "
              f"Please report it{_where_the_traceback_is()}.", 1)


def _print_any_text() -> None:
    """Sees to it that no character ends a command: where the encoding of the output lacks it, a question mark stands in
    its place, and a path that is not UTF-8 is printed byte by byte. The error output has Python's escapes already."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        utf_8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf_8 else "replace")


def _where_the_traceback_is() -> str:
    """Writes the traceback of the error that is being handled to a file, and returns where; "" on a full disk."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="pilot-jax-error-", suffix=".txt", delete=False,
                                         encoding="utf-8", errors="backslashreplace") as file:
            traceback.print_exc(file=file)
    except OSError:
        return ""
    return f", with the traceback in {file.name}"


def _fail(message: str, code: int) -> None:
    if len(message) > 2500:  # a path or a value of thousands of characters
        message = f"{message[:1200]} … {message[-1200:]}"
    typer.echo(printable(message), err=True)
    if supervise.is_child():
        _end(code)
    sys.exit(code)


def _end(code: int) -> None:
    """Ends this process at once. JAX would first wait for other processes, which may be waiting for this one."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
