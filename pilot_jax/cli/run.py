"""`pilot-jax run`: simulate a federation."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Annotated

import typer

from pilot_jax.cli.options import ConfigPath, Overrides
from pilot_jax.cli.tables import print_scores, printable
from pilot_jax.errors import InputError, Interrupted


def run(config: ConfigPath, overrides: Overrides = None,
        out: Annotated[Path | None, typer.Option(help="New run directory; default runs/<config>-<time>.")] = None,
        resume: Annotated[bool, typer.Option(
            "--resume", help="Go on with the run in --out; if none is there, begin it.")] = False,
        progress_: Annotated[str, typer.Option(
            "--progress", help="auto; json: events and the summary, a line each; quiet: warnings alone.")] = "auto",
        coordinator: Annotated[str | None, typer.Option(
            help="host:port of process 0, where several processes run one federation.")] = None,
        num_processes: Annotated[int | None, typer.Option(min=1, help="With --coordinator: how many.")] = None,
        process_id: Annotated[int | None, typer.Option(min=0, help="With --coordinator: which this is.")] = None,
        distributed: Annotated[bool, typer.Option(
            help="Several processes, of which Slurm, a TPU pod or MPI tells.")] = False) -> None:
    """Simulate a federation and write its run directory."""
    import threading
    import time

    from pilot_jax.config import load_config
    from pilot_jax.federation.state import Federation
    from pilot_jax.parallel import processes
    from pilot_jax.parallel.devices import ask_for_determinism, split_cpu
    from pilot_jax.planning.forecast import forecast, told
    from pilot_jax.runs.events import ProgressDisplay
    from pilot_jax.runs.simulate import simulate, steps_by_stage

    if progress_ not in ("auto", "json", "quiet"):
        raise InputError(f"--progress: {progress_!r}, expected auto, json or quiet.")
    settings = load_config(config, overrides)
    ask_for_determinism(settings.system)
    split_cpu(settings.system, num_processes or 1)
    if distributed or coordinator is not None or num_processes is not None or process_id is not None:
        processes.start(coordinator, num_processes, process_id)
    folder = out or Path("runs") / f"{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    displays: list[ProgressDisplay] = []
    asides: list[threading.Thread] = []

    def expectation(fed: Federation) -> str:
        try:
            return told(forecast(fed))
        except Exception as error:  # the run does not depend on it
            return f"warning: no forecast: {type(error).__name__}: {error}"

    def progress(fed: Federation) -> ProgressDisplay:
        import jax

        total, rounds = sum(steps_by_stage(fed).values()), settings.federation.rounds
        display = ProgressDisplay(total, mode=progress_, rounds=rounds)
        display({"kind": "note", "text":
            f"{fed.strategy.name}: {len(fed.clients)} clients, {len(fed.tasks)} tasks ({', '.join(fed.tasks)}), "
            f"{rounds} round{'s' * (rounds > 1)}, {total} client steps on {jax.devices()[0].device_kind} → {folder}"})
        displays.append(display)
        if jax.process_count() == 1:  # while the first program is compiled
            asides.append(threading.Thread(target=lambda: display({"kind": "note", "text": expectation(fed)})))
            asides[0].start()
        return display

    try:
        if resume and out is None:
            raise InputError("--resume: which run? Give its folder as --out.")
        result = simulate(settings, out=folder, resume=resume, progress=progress if processes.is_writer() else None)
    except (Interrupted, KeyboardInterrupt) as stop:  # the second before anything is trained
        if processes.is_writer():
            typer.echo(f"\nInterrupted. {_how_to_go_on(folder)}", err=True)
        raise typer.Exit(128 + getattr(stop, "signum", signal.SIGINT)) from None
    except FloatingPointError as error:
        typer.echo(f"Failed: {printable(str(error))}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(f"Failed: {printable(str(error))}. {_how_to_go_on(folder)}", err=True)
        raise typer.Exit(1) from None
    finally:
        for thread in asides:
            thread.join()
        for display in displays:
            display.close()
    if processes.is_writer() and progress_ == "json":
        typer.echo(json.dumps({"kind": "summary", "folder": str(folder)} | result.summary))
    elif processes.is_writer() and progress_ == "auto":
        print_scores(result.summary)
        typer.echo(f"Run directory: {folder}")


def _how_to_go_on(folder: Path) -> str:
    if not (folder / "config.yaml").is_file():
        return "Nothing was written."
    return f"To go on: pilot-jax run {folder / 'config.yaml'} --out {folder} --resume"
