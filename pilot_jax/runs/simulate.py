"""A whole run: prepare, train all rounds, evaluate, write the run directory."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from pilot_jax import __version__
from pilot_jax.config import Config
from pilot_jax.errors import InputError, Interrupted
from pilot_jax.evaluation.personalised import evaluate, mean_score, score_by_task
from pilot_jax.federation.cohort import members_of
from pilot_jax.federation.privacy import epsilon
from pilot_jax.federation.rounds import run_round
from pilot_jax.federation.state import Federation, State, Tamper, prune
from pilot_jax.federation.strategies.base import Strategy
from pilot_jax.parallel.devices import PROGRAMS_KEPT, ask_for_determinism
from pilot_jax.parallel.host_memory import give_back
from pilot_jax.parallel.processes import is_writer, wait
from pilot_jax.runs import checkpoint
from pilot_jax.runs.events import CompileClock, MetricsFile
from pilot_jax.runs.folder import RunFolder
from pilot_jax.runs.prepare import initial_state, prepare, see_everything
from pilot_jax.runs.restore import Run, restore
from pilot_jax.runs.resume import Snapshots
from pilot_jax.runs.signals import StopSignals
from pilot_jax.runs.tensorboard import EventFiles, check_installed


def steps_by_stage(fed: Federation) -> dict[str, int]:
    """Client steps of the whole run in each stage, known before it starts."""
    seen: set[int] = set()
    out: dict[str, int] = {}
    for round_ in range(1, fed.config.federation.rounds + 1):
        for c in members_of(fed, round_):
            for stage in fed.strategy.stages(c not in seen, round_):
                out[stage] = out.get(stage, 0) + fed.steps(c, round_)
            seen.add(c)
    return out


def data_sha256(fed: Federation) -> str:
    """Of the clients' names, tasks and training tokens: whether a run that goes on has the data it began with."""
    digest = hashlib.sha256()
    for client in fed.examined:
        digest.update(json.dumps([client.name, client.task, client.size]).encode())
        digest.update(np.ascontiguousarray(client.train["input_ids"]).tobytes())
    return digest.hexdigest()


def _epsilon(fed: Federation, state: State) -> float | None:
    """What the uploads of the client with most of them cost in privacy; None where nothing is promised."""
    return epsilon(fed.noise_multiplier, max(state.uploads), fed.config.federation.privacy.delta
                   ) if fed.noise_multiplier else None


@dataclasses.dataclass
class Clocks:
    """Seconds, those of earlier attempts at the run included."""

    wall: float = 0.0
    compile: float = 0.0
    train_compile: float = 0.0


def _summary(fed: Federation, state: State, tokenizer: Any, clocks: Clocks) -> dict[str, Any]:
    by_client, base = evaluate(fed, tokenizer, state.population), evaluate(fed, tokenizer, None)
    names = [c.name for c in fed.examined]
    device = jax.local_devices()[0].memory_stats() or {}
    host_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "strategy": fed.strategy.name, "seed": fed.config.system.seed, "rounds": fed.config.federation.rounds,
        "clients": names, "tasks": list(fed.tasks), "task_by_client": {c.name: c.task for c in fed.examined},
        "score_mean": mean_score(list(by_client.values())), "score_by_task": score_by_task(fed, by_client),
        "score_by_client": by_client,
        "score_base": mean_score(list(base.values())), "score_base_by_task": score_by_task(fed, base),
        "score_base_by_client": base,
        "bytes_up": state.bytes_up, "bytes_down": state.bytes_down, "client_steps": state.client_steps,
        # Compilation apart: it is reported beside, and would otherwise hide the speed of long runs.
        "client_steps_per_second": state.client_steps / max(state.train_seconds - clocks.train_compile, 1e-9),
        "quarantined": state.quarantined, "epsilon": _epsilon(fed, state),
        "wall_seconds": clocks.wall, "compile_seconds": clocks.compile,
        "peak_memory_bytes": int(device.get("peak_bytes_in_use", host_peak)),
        "versions": {"pilot_jax": __version__} | _versions(),
        "adapters_sha256": checkpoint.adapters_sha256([c.name for c in fed.clients], state.population),
    }


def simulate(config: Config, *, out: str | Path | None = None, resume: bool = False, strategy: Strategy | None = None,
             tamper: Tamper | None = None,
             progress: Callable[[Federation], Callable[[dict], None]] | None = None) -> Run:
    """Run a federation.

    Args:
        out: the run directory, which must not exist or be empty; None writes nothing.
        resume: whether to go on with the run that is in `out`; if none is, this is its start.
        strategy: an object of your own instead of `config.strategy.name`.
        tamper: (client, round, upload, start) -> upload: what simulated attackers make of theirs; `start` is the same
            subtrees at the start of the phase.
        progress: makes, from the federation, a function that is called with progress events.

    Raises:
        InputError: bad config, data or checkpoint, or another run's folder; nothing has been written then.
        Interrupted: SIGINT or SIGTERM; what was trained is saved, and `resume` goes on from there.
        FloatingPointError: see `federation.on_bad_client`.
        OSError: something could not be written; what was saved before is intact.
    """
    began = time.perf_counter()
    clock = CompileClock()
    if config.system.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.system.compilation_cache).expanduser()))
        # Without a limit, JAX reads and writes without a lock.
        if jax.config.jax_compilation_cache_max_size == -1:  # type: ignore[attr-defined]
            jax.config.update("jax_compilation_cache_max_size", PROGRAMS_KEPT)
    ask_for_determinism(config.system)
    if config.system.tensorboard:
        check_installed()
    if resume and out is None:
        raise InputError("--resume: which run? Give its folder as --out.")
    folder = None if out is None else RunFolder(out, config, resume, is_writer())
    wait("run directory")  # until all have seen it as it was
    try:
        if folder is not None and folder.finished:
            return restore(folder.path)
        fed, tokenizer = prepare(config, strategy)
        fed = dataclasses.replace(fed, tamper=tamper)
        see_everything(fed)
        if folder is not None:
            folder.begin()
        return _run(fed, tokenizer, folder, clock, began, progress(fed) if progress else (lambda event: None))
    finally:
        clock.stop()
        if folder is not None:
            folder.close()


def _run(fed: Federation, tokenizer: Any, folder: RunFolder | None, clock: CompileClock, began: float,
         show: Callable[[dict], None]) -> Run:
    """Train what is left to train, evaluate, write."""
    config, roles, writes = fed.config, fed.strategy.roles(), folder is not None and is_writer()

    def note(text: str) -> None:
        show({"kind": "note", "text": text})

    if config.strategy.name == "pilot" and config.strategy.init == "copy":
        note("warning: strategy.init: copy starts ψ_t and ψ_s equal; L_d is symmetric in them, so they stay equal and "
             "never separate. 'preserve' does not have this.")
    names, task_of = [c.name for c in fed.clients], {c.name: c.task for c in fed.examined}
    state, earlier, kept = initial_state(fed), Clocks(), 0
    snapshots = None if folder is None else Snapshots(folder.path / "checkpoints" / "resume", names, roles,
                                                      config.system.keep_saved, fed.mesh)
    data = "" if folder is None else data_sha256(fed)
    if folder is not None and folder.resumes:
        found = snapshots.load(state, fed.store, note, writes)
        for line in folder.notes:
            note(line)
        if found is not None:
            state, extra = found
            _check_same(extra, fed, folder, data, note)
            earlier, kept = Clocks(**extra["clocks"]), extra["metrics"]
            note(f"going on in round {state.round} after {state.client_steps} client steps")
    record = MetricsFile(folder.path / "metrics.jsonl" if writes else None, kept)
    if writes and config.system.tensorboard:
        record.also = EventFiles(folder.path / "tensorboard", record.records)
    train_compile, compiled, saved = earlier.train_compile, clock.seconds, state

    def clocks() -> Clocks:
        return Clocks(earlier.wall + time.perf_counter() - began, earlier.compile + clock.seconds, train_compile)

    def save() -> None:
        nonlocal saved
        if snapshots is not None and saved is not state:
            snapshots.save(state, {"metrics": record.synced(), "clocks": dataclasses.asdict(clocks()),
                                   "data": data, "versions": _versions()})
        saved = state

    def after_phase(now: State, trained: list[int]) -> None:
        nonlocal state, train_compile, compiled
        state, train_compile, compiled = now, train_compile + clock.seconds - compiled, clock.seconds
        if snapshots is not None:
            snapshots.note(trained)
        if config.system.save_every == "phase":
            save()
        give_back()
        if signum := stop():
            raise Interrupted(signum)

    stop = StopSignals(note)
    try:
        with stop:
            while state.round <= config.federation.rounds:
                round_, compiled = state.round, clock.seconds
                after = run_round(fed, state, round_, show, record,
                                  folder.save_mixing if folder is not None else lambda *args: None, after_phase, stop)
                if fed.store is not None:
                    prune(fed.store, after.population)
                # Until this is done, `state` is as of the last phase: who goes on from there scores again.
                if config.eval.every and round_ % config.eval.every == 0:
                    stop.waits = False
                    _validate(fed, tokenizer, after, round_, task_of, record, show)
                    stop.waits = True
                state = after
                if config.system.save_every == "round":
                    save()
            note("evaluating on the test split …")
            stop.waits = False
            summary = _summary(fed, state, tokenizer, clocks())
            stop.waits = True
            if fed.store is not None:
                fed.store.flush()  # had anything not been written, the run would end here
            if writes:
                checkpoint.save_population(folder.path / "checkpoints", names, state.population, roles)
                folder.end(summary)
                snapshots.remove()
    except Interrupted as interrupted:
        if interrupted.partial is not None:
            state = dataclasses.replace(state, partial=interrupted.partial[0])
        save()
        raise
    finally:
        record.close()
    wait("end of run")  # the writer is done
    return Run(config, fed, tokenizer, state.population, summary, record.records)


def _check_same(saved: Mapping[str, Any], fed: Federation, folder: RunFolder, data: str,
                note: Callable[[str], None]) -> None:
    """That what a snapshot has `saved` beside the state can be gone on from, with these data."""
    if not {"data", "versions", "clocks", "metrics"} <= set(saved):
        raise InputError(f"{folder.path}: its snapshots were not written by this version. Start another run.")
    if saved["data"] != data:
        raise InputError(f"data.path: {fed.config.data.path} has other training samples than when the run in "
                         f"{folder.path} began. Give the same data, or start another run.")
    if saved["versions"] != _versions():
        note(f"note: begun with {saved['versions']}, now {_versions()}: results agree to rounding, not bit for bit.")


def _validate(fed: Federation, tokenizer: Any, state: State, round_: int, task_of: dict[str, str],
              record: Callable[[dict], None], show: Callable[[dict], None]) -> None:
    by_client = evaluate(fed, tokenizer, state.population, "validation")
    for name, value in by_client.items():
        record({"round": round_, "split": "validation", "client": name, "task": task_of[name], "score": value})
    if by_client:
        show({"kind": "score", "text": f"round {round_}: validation score "
              f"{mean_score(list(by_client.values())):.3f}"})


def _versions() -> dict[str, str]:
    """What decides whether the same program gives the same bits."""
    device = jax.devices()[0]
    return {"jax": jax.__version__, "device": device.device_kind, "numpy": np.__version__}
