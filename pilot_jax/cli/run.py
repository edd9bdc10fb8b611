"""The command `run`."""

from __future__ import annotations

import json
import shlex
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pilot_jax.cli.options import ConfigPath, Overrides, StrategyName, Use, check_choice, read_config, with_choices
from pilot_jax.cli.supervise import in_child
from pilot_jax.cli.tables import print_scores, printable
from pilot_jax.errors import InputError, Interrupted, is_wrong_path

if TYPE_CHECKING:
    from pilot_jax.config import Config
    from pilot_jax.federation.observer import RunObserver
    from pilot_jax.runs.restore import Run


def run(config: ConfigPath, overrides: Overrides = None, strategy: StrategyName = None, use: Use = None,
        out: Annotated[Path | None, typer.Option(
            help="New run directory. Default: a folder in runs/, named after config and time.")] = None,
        resume: Annotated[bool, typer.Option(
            "--resume", help="Continue the run in --out from its last snapshot. If there is none, start it.")] = False,
        progress: Annotated[str, typer.Option(
            help="auto: progress bars or lines; json: events and the summary as lines of JSON; quiet: only warnings."
        )] = "auto",
        coordinator: Annotated[str | None, typer.Option(
            help="Address host:port of process 0, if several processes run one federation.")] = None,
        num_processes: Annotated[int | None, typer.Option(
            min=1, help="Number of processes, if there is a coordinator.")] = None,
        process_id: Annotated[int | None, typer.Option(
            min=0, help="Number of this process, counted from 0, if there is a coordinator.")] = None,
        distributed: Annotated[bool, typer.Option(
            help="Join the processes that Slurm, a TPU pod or MPI has started, to run one federation.")] = False
        ) -> None:
    """Simulate a federation and write its run directory."""
    check_choice("--progress", progress, "auto", "json", "quiet")
    settings = read_config(config, overrides, strategy)
    if resume and out is None:
        raise InputError("--resume: no run directory. Give its folder as --out.")
    folder = out or Path("runs") / f"{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    several = distributed or coordinator is not None or num_processes is not None or process_id is not None
    if several:
        in_child(lambda: _how_to_go_on(settings, folder, use))
    from pilot_jax.parallel import processes
    from pilot_jax.runs.prepare import configure, split_cpu_for

    configure(settings)
    split_cpu_for(settings, num_processes or 1)
    if several:
        processes.connect(coordinator, num_processes, process_id)
    settings = with_choices(settings, typer.echo if processes.is_writer() and progress == "auto" else None)
    summary = _simulate(settings, folder, resume, progress, use).summary
    if processes.is_writer() and progress == "json":
        typer.echo(json.dumps({"kind": "summary", "folder": str(folder)} | summary))
    elif processes.is_writer() and progress == "auto":
        print_scores(summary)
        typer.echo(f"Run directory: {folder}")


def _simulate(config: Config, folder: Path, resume: bool, progress: str, use: list[str] | None) -> Run:
    """Simulates with progress on the terminal. An interruption or an error ends the command with a message."""
    from pilot_jax.parallel import processes
    from pilot_jax.runs.simulate import simulate

    try:
        return simulate(config, out=folder, resume=resume,
                        observers=_observers(config, folder, progress) if processes.is_writer() else ())
    except (Interrupted, KeyboardInterrupt) as stop:  # KeyboardInterrupt: before training, while data are loaded
        if processes.is_writer():
            typer.echo(f"\nInterrupted. {_how_to_go_on(config, folder, use)}", err=True)
        raise typer.Exit(128 + getattr(stop, "signum", signal.SIGINT)) from None
    except FloatingPointError as error:
        typer.echo(f"Failed: {printable(str(error))}", err=True)
        raise typer.Exit(1) from None
    except Exception as error:
        expected = isinstance(error, OSError) or processes.is_one_of_several()
        if isinstance(error, InputError) or not expected or is_wrong_path(error):
            raise
        what = printable(" ".join(str(error).split())[:500])
        typer.echo(f"Failed: {what}. {_how_to_go_on(config, folder, use)}", err=True)
        raise typer.Exit(1) from None


def _observers(config: Config, folder: Path, progress: str) -> list[RunObserver]:
    """Returns the observers that show the run on the terminal."""
    from pilot_jax.cli.forecast import Forecast
    from pilot_jax.runs.progress import ProgressDisplay

    display = ProgressDisplay(folder, mode=progress)
    return [display, Forecast(config, display)]


def _how_to_go_on(config: Config, folder: Path, use: list[str] | None) -> str:
    from pilot_jax.runs.prepare import strategy_name

    if not (folder / "config.yaml").is_file():
        return "Nothing was written."
    name = strategy_name(config)
    own = (["--strategy", name] if ":" in name else []) + [part for module in use or [] for part in ("--use", module)]
    return "To go on: " + shlex.join(["pilot-jax", "run", str(folder / "config.yaml"), "--out", str(folder), "--resume",
                                      *own])
