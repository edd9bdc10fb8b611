"""Runs a federation from start to end: prepares it, trains all rounds, evaluates, and writes the run directory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pilot_jax.config import Config, load_config
from pilot_jax.data.division import missing_splits
from pilot_jax.data.given import as_data
from pilot_jax.errors import InputError, Interrupted
from pilot_jax.evaluation.finetune import Finetuned, after_finetuning, finetune
from pilot_jax.evaluation.personalised import evaluate, mean_score
from pilot_jax.federation.observer import Observers, Record, RunObserver
from pilot_jax.federation.rounds import run_round
from pilot_jax.federation.state import Population, State, Tamper, prune
from pilot_jax.federation.strategies import Strategy
from pilot_jax.parallel import processes
from pilot_jax.parallel.allocator import give_back
from pilot_jax.parallel.processes import is_writer, wait_for_all
from pilot_jax.runs.ahead import compile_first_round, compute_all_features, import_later
from pilot_jax.runs.best import BestState
from pilot_jax.runs.checkpoint import save_population
from pilot_jax.runs.events import CompileClock, MetricsFile, MixingFiles
from pilot_jax.runs.folder import RunFolder
from pilot_jax.runs.manifest import Written, fault, written_before
from pilot_jax.runs.prepare import (
    Setup,
    configure,
    given_data,
    initial_state,
    prepare,
    with_own_strategy,
)
from pilot_jax.runs.restore import Run, restore
from pilot_jax.runs.resume import Snapshots
from pilot_jax.runs.signals import StopSignals
from pilot_jax.runs.summary import Clocks, costs, data_sha256, summarise, versions
from pilot_jax.runs.trackers import EventFiles, open_services


def simulate(config: Config | str | Path, *, out: str | Path | None = None, resume: bool = False,
             strategy: Strategy | None = None, tamper: Tamper | None = None, observers: Sequence[RunObserver] = (),
             data: Any = None) -> Run:
    """Runs a federation. `config` may be the path of its file.

    Args:
        out: the run directory, which must be new or empty unless `resume` is set; None writes nothing.
        resume: whether to go on with the run in `out`; if there is none, the run starts from its beginning.
        strategy: a strategy object, used instead of `config.strategy`; `config.yaml` will have its class.
        tamper: a function (client, round, upload, start) -> upload that simulates attackers: it replaces each upload;
            `start` is the upload as of the start of the phase.
        observers: objects whose methods are called during the run.
        data: samples, used instead of `data.path`: a `Data`, or what its `source` may be. To resume, give the same.

    Raises:
        InputError: config, data or checkpoint are wrong, or `out` is another run's; nothing has been written then.
        Interrupted: SIGINT, SIGTERM or an observer stopped the run; its state is saved, and `resume` goes on from it.
        FloatingPointError: an upload was refused and `federation.on_bad_client` is "stop".
        OSError: a file could not be written; what was saved before is intact.
    """
    began, clock, folder, samples = time.perf_counter(), CompileClock(), None, None
    try:
        config = config if isinstance(config, Config) else load_config(config)
        if strategy is not None:
            config, strategy = with_own_strategy(config, strategy)
        configure(config)
        if data is not None:
            config, samples = given_data(config, data := as_data(data))
        if resume and out is None:
            raise InputError("--resume: no run directory. Give its folder as --out.")
        folder = None if out is None else RunFolder(out, config, resume, is_writer())
        wait_for_all("run directory")  # no process may write to it before all have checked it
        if folder is not None and folder.finished:
            return restore(folder.path, data=data)
        setup = _tampered(prepare(config, strategy, samples), tamper)
        state = initial_state(setup.federation)
        compile_first_round(setup, state)
        compute_all_features(setup)
        if folder is not None:
            folder.begin()
        return RunLoop(setup, state, folder, clock, began, observers).run()
    finally:
        clock.stop()
        if folder is not None:
            folder.close()


def _tampered(setup: Setup, tamper: Tamper | None) -> Setup:
    fed = dataclasses.replace(setup.federation, tamper=tamper)
    return dataclasses.replace(setup, federation=fed, evaluation=dataclasses.replace(setup.evaluation, fed=fed))


class RunLoop(RunObserver):
    """Trains a run from its start, or from its last snapshot, to its summary.

    It is also an observer of its own rounds: after each phase it takes over the new state, and saves it.
    """

    def __init__(self, setup: Setup, state: State, folder: RunFolder | None, clock: CompileClock, began: float,
                 observers: Sequence[RunObserver]) -> None:
        self.setup, self.fed, self.folder, self.clock, self.began = setup, setup.federation, folder, clock, began
        self.writes = folder is not None and is_writer()
        import_later(setup, self.writes)
        self.state = self.saved = state
        self.earlier, self.train_compile, self.compiled = Clocks(), 0.0, 0.0
        self.data = "" if folder is None else data_sha256(setup.evaluation.clients)
        self.snapshots = None if folder is None else Snapshots(
            folder.path / "checkpoints" / "resume", self.fed.names, self.fed.strategy.ownership(),
            setup.system.keep_saved, self.fed.mesh)
        self.best = BestState(setup.eval.keep == "best",
                              None if folder is None else folder.path / "checkpoints" / "resume" / "best", self.fed)
        self.outside = Observers(*observers)
        self.signals = StopSignals(self.outside.note)
        self.metrics, self.mixing = MetricsFile(None), MixingFiles(Path())
        self.files: list[RunObserver] = []
        self.lines: Written | None = None  # of metrics.jsonl before fine-tuning, which a resumed run begins again
        self.observer = Observers(self.outside, self, self.signals)

    def run(self) -> Run:
        """Trains the remaining rounds, evaluates, and writes the results."""
        try:
            self.resume()
            with self.signals:
                self.observer.run_started(self.fed, self.state)
                while self.state.round <= self.fed.settings.rounds and not self.is_over():
                    self.round()
                population, summary = self.finish()
        except Interrupted as interrupted:
            if interrupted.partial is not None:
                self.state = dataclasses.replace(self.state, partial=interrupted.partial[0])
            self.save()
            raise
        finally:
            self.observer.close()
        wait_for_all("end of run")  # until the writer has written everything
        return Run(self.setup, population, summary, self.metrics.records)

    def resume(self) -> None:
        """Loads the last snapshot, if the folder has one, and opens the run's files."""
        before, services, initial = dict[str, Written](), list[RunObserver](), self.state
        if self.folder is not None and self.folder.resumes:
            assert self.snapshots is not None
            found = self.snapshots.load(self.state, self.fed.store, self.outside.note, self.writes)
            for line in self.folder.notes:
                self.outside.note(line)
            if found is not None:
                self.state, extra = found
                self._check_same(extra)
                before = self._files_before(extra)
                self.saved, self.earlier = self.state, Clocks(**extra["clocks"])
                self.train_compile = self.earlier.train_compile
                self.outside.note(f"going on in round {self.state.round} after {self.state.client_steps} client steps")
        clients = {client.name: ("train", *client.evaluation) for client in self.setup.evaluation.clients}
        for warning in (self.fed.strategy.warning(), *missing_splits(clients, self.setup.eval.every)):
            if warning:
                self.outside.note(f"warning: {warning}")
        if self.writes:
            assert self.folder is not None
            metrics = before.pop("metrics.jsonl", None)
            self.metrics = MetricsFile(self.folder.path / "metrics.jsonl", metrics["bytes"] if metrics else 0)
            self.mixing = MixingFiles(self.folder.path / "mixing",
                                      {Path(name).name: entry for name, entry in before.items()})
            system, path, records = self.setup.system, self.folder.path, self.metrics.records
            self.files = [self.mixing, *([EventFiles(path / "tensorboard", records)] if system.tensorboard else [])]
            services += open_services(system, path, records, self.outside)
        self.observer = Observers(*self.files, self.metrics, *services, self.outside, self, self.signals)
        if self.metrics.records:
            self.best.resume(self.metrics.records, initial, self.outside.note, self.writes)
            self.observer.run_resumed(self.metrics.records)

    def _files_before(self, extra: Mapping[str, Any]) -> dict[str, Written]:
        """Returns the files that the run had written when its snapshot was, without those that are missing.

        Raises:
            InputError: a file was changed since.
        """
        assert self.folder is not None
        files = written_before(extra)
        for name in [name for name in files if not (self.folder.path / name).exists()]:
            del files[name]
            self.outside.note(f"warning: {self.folder.path / name} is missing. The run goes on without it.")
        for name, entry in files.items():
            if what := fault(self.folder.path / name, entry, grows=name == "metrics.jsonl"):
                raise InputError(f"{self.folder.path / name}: {what}. Put back a copy, or move the file away to go on "
                                 "without it.")
        return files

    def _check_same(self, saved: Mapping[str, Any]) -> None:
        """Checks that the training data are those of the snapshot; `saved` is the snapshot's `extra`."""
        assert self.folder is not None
        if not {"data", "versions", "clocks", "metrics", "mixing"} <= set(saved):
            raise InputError(f"{self.folder.path}: its snapshots were not written by this version of pilot_jax. Start "
                             "another run.")
        if saved["data"] != self.data:
            raise InputError(f"data.path: {self.setup.evaluation.data.path} has other training samples than when the "
                             f"run in {self.folder.path} began. Give the same data, or start another run.")
        if saved["versions"] != versions():
            self.outside.note(f"note: the run began with {saved['versions']} and goes on with {versions()}: results "
                              "agree to rounding, not bit for bit.")

    def is_over(self) -> bool:
        """Returns whether an observer, in any process, asks for the end of training; it can between two rounds."""
        between = self.state.round > 1 and self.state.phase == 0 and self.state.partial is None
        over = between and processes.largest_of_all(int(self.observer.finish_requested())) > 0
        if over:
            self.observer.note(f"training ends after round {self.state.round - 1}, as an observer asks")
        return over

    def round(self) -> None:
        """Trains what is left of a round, and scores the validation split if `eval.every` says so."""
        round_, self.compiled = self.state.round, self.clock.seconds
        after, = run_round([self.fed], [self.state], self.setup.executor, [self.observer])
        assert after is not None
        if self.fed.store is not None:
            prune(self.fed.store, (*after.population, *self.best.population()))
        # `state` stays that of the last phase until the scores are known, so that a resumed run computes them again.
        if self.setup.eval.every and round_ % self.setup.eval.every == 0:
            self.signals.waits = False
            self._validate(after, round_)
            self.signals.waits = True
        self.state = after
        if self.setup.system.save_every == "round":
            self.save()
        self.observer.round_ended(after)

    def _validate(self, state: State, round_: int) -> None:
        by_client = evaluate(self.setup.evaluation, state.population, "validation")
        tasks = {c.name: c.task for c in self.setup.evaluation.clients}
        for name, value in by_client.items():
            self.observer.client_scored({"round": round_, "split": "validation", "client": name, "task": tasks[name],
                                         "score": value})
        mean = mean_score(list(by_client.values()))
        if mean is not None:
            self.best.scored(state, round_, mean)
            self.observer.round_scored(round_, mean)

    def phase_ended(self, state: State, record: Record, mixing: Mapping[str, np.ndarray] | None,
                    trained: Sequence[int]) -> None:
        self.state = state
        self.train_compile, self.compiled = self.train_compile + self.clock.seconds - self.compiled, self.clock.seconds
        self.best.note(trained)
        if self.snapshots is not None:
            self.snapshots.note(trained)
        if self.setup.system.save_every == "phase":
            self.save()
        give_back()

    def clocks(self) -> Clocks:
        """Returns the seconds of the run so far, earlier attempts included."""
        return Clocks(self.earlier.wall + time.perf_counter() - self.began, self.earlier.compile + self.clock.seconds,
                      self.train_compile)

    def save(self) -> None:
        """Writes a snapshot, unless the current state has been saved already."""
        if self.snapshots is not None and self.saved is not self.state:
            self.snapshots.save(self.state, {
                "metrics": self.lines or self.metrics.synced(), "mixing": self.mixing.written, "data": self.data,
                "clocks": dataclasses.asdict(self.clocks()), "versions": versions()})
        self.saved = self.state

    def finetune(self, state: State) -> Finetuned | None:
        """Fine-tunes the clients of a state if the config or the strategy asks for it; `self.state` stays the last."""
        if self.fed.finetuning() is None:
            return None
        self.lines = self.metrics.synced()
        self.observer.note("fine-tuning every client on its own data …")
        compiled = self.clock.seconds
        tuned, = finetune([self.fed], [state], self.setup.executor, [self.observer])
        self.train_compile += self.clock.seconds - compiled
        give_back()
        return tuned

    def finish(self) -> tuple[Population, dict[str, Any]]:
        """Fine-tunes, scores the test split, and writes the results. Returns (final population, summary)."""
        state = self.best.chosen(self.state, self.observer.note)
        tuned = self.finetune(state)
        final = after_finetuning(self.fed, state, tuned)
        self.observer.note("evaluating on the test split …")
        self.signals.waits = False
        summary = summarise(self.setup.evaluation, state, tuned) | {"best_round": self.best.round or None}
        self.signals.waits = True
        if self.fed.store is not None:
            self.fed.store.flush()  # raises if something could not be written
            prune(self.fed.store, final.population)
        if self.writes:
            assert self.folder is not None and self.snapshots is not None
            save_population(self.folder.path / "checkpoints", self.fed.names, final.population,
                            self.fed.strategy.ownership())
            for file in (*self.files, self.metrics):
                file.close()
        summary |= costs(self.setup.evaluation, final, self.clocks())
        if self.writes:
            assert self.folder is not None and self.snapshots is not None
            self.folder.end(summary)
            self.snapshots.remove()
        self.observer.run_ended(summary)
        return final.population, summary
