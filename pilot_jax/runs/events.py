"""What a run tells: `metrics.jsonl`, and progress on the terminal (live, or plain lines where there is none)."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from pilot_jax.errors import InputError


class MetricsFile:
    """Appends one JSON object per line; every line is complete on disk before the next begins.

    keep: bytes of an earlier attempt's file that count; what comes after them is cut off.

    Raises:
        InputError: the file is shorter than that.
    """

    def __init__(self, path: Path | None, keep: int = 0) -> None:
        self._file, self.records = None, []
        self.also: Any = None  # hears each record too, and is closed
        if path is None:
            return
        self._file = path.open("ab")
        if self._file.tell() < keep:
            raise InputError(f"{path}: {keep} bytes were written to it, {self._file.tell()} are there. Start the run "
                             "anew, with another --out.")
        self._file.truncate(keep)
        self.records = [json.loads(line) for line in path.read_bytes().splitlines()]

    def __call__(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        if self.also is not None:
            self.also(record)
        if self._file is not None:
            self._file.write((json.dumps(record) + "\n").encode())
            self._file.flush()

    def synced(self) -> int:
        """Bytes of the file, when they are on disk for good."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self.also is not None:
            self.also.close()


class CompileClock:
    """Seconds spent in XLA compilation, and how many programs it made, since its creation."""

    def __init__(self) -> None:
        import jax

        self.seconds, self.programs = 0.0, 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)  # type: ignore[arg-type]

    def _hear(self, event: str, duration: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.seconds += duration
            self.programs += 1

    def stop(self) -> None:
        import jax

        jax.monitoring.unregister_event_duration_listener(self._hear)  # type: ignore[arg-type]


class ProgressDisplay:
    """Run, phase and client, losses, scores, client steps a second and time left; called with what `rounds` emits.

    mode: auto (bars on terminals, else a line a phase), json (each event a line of JSON) or quiet.
    """

    def __init__(self, total_steps: int, console: Console | None = None, mode: str = "auto", rounds: int = 1) -> None:
        self.console, self._mode = console or Console(), mode
        self._total, self._before, self._rounds, self._score = total_steps, 0, rounds, ""
        self._started = time.perf_counter()
        self._bar = None
        if self.console.is_terminal and mode == "auto":
            self._bar = Progress(TextColumn("{task.description}"), BarColumn(30), MofNCompleteColumn(),
                                 TextColumn("{task.fields[note]}"), console=self.console, transient=True)
            self._bar.start()
            self._run = self._bar.add_task("run, client steps", total=total_steps, note="compiling …")
            self._phase = self._bar.add_task("phase, clients", total=None, note="")

    def __call__(self, event: dict[str, Any]) -> None:
        if self._mode != "auto":
            if self._mode == "json":
                print(json.dumps(event), flush=True)
            elif str(event.get("text", "")).startswith("warning"):
                print(event["text"], file=sys.stderr)
            return
        if event["kind"] == "chunk":
            self._chunk(event)
        elif event["kind"] == "phase":
            self._before += event["client_steps"]
            if self._bar is not None:
                self._say(f"round {event['round']} {event['phase']}: loss {event['loss']:.3f}, effective neighbours "
                          f"{event['effective_neighbors']:.2f}, {event['seconds']:.1f} s"
                          + (f", ε {event['epsilon']:.3g}" if "epsilon" in event else ""))
        else:
            if event["kind"] == "score":
                self._score = f", {event['text']}"
            self._say(event["text"])

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False)

    def _chunk(self, event: dict[str, Any]) -> None:
        done = self._before + event["steps"]
        speed = done / (time.perf_counter() - self._started)
        pace = f"{speed:.1f} client-steps/s, {(self._total - done) / speed:.0f} s left"
        if self._bar is not None:
            self._bar.update(self._run, completed=done, note=pace + self._score)
            self._bar.update(self._phase, total=event["of"], completed=event["clients"],
                             description=f"round {event['round']}/{self._rounds} {event['phase']}, clients",
                             note=f"loss {event['loss']:.3f}")
        elif event["clients"] == event["of"]:
            self._say(f"round {event['round']} {event['phase']} client {event['clients']}/{event['of']} "
                      f"loss {event['loss']:.3f} {pace}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
