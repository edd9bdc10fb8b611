"""Fine-tuning: after the last round, every client trains its model further on its own data, and uploads nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from pilot_jax.errors import Interrupted
from pilot_jax.federation.executor import Executor, Work
from pilot_jax.federation.observer import Observers, Record, RunObserver
from pilot_jax.federation.phases import PhaseSpec
from pilot_jax.federation.rounds import CurrentAdapters
from pilot_jax.federation.state import (
    AnyState,
    ClientState,
    CurrentState,
    Federation,
    Population,
    State,
    Trained,
    stored,
)

LABEL = "finetune"  # of the phase, in records and progress
AT_ONCE = 128  # clients whose results are in memory at the same time, if the federation has a store


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """The results of fine-tuning: every client's state, and what the training took."""

    fed: Federation  # its clients have their own data, also where the strategy pools them
    population: Population
    client_steps: int
    seconds: float


def common_models(fed: Federation, state: State) -> Population | None:
    """Returns every client's state with the server's current model; None where clients have models or parts of their
    own (`Strategy.has_common_model`)."""
    if not fed.strategy.has_common_model():
        return None
    stage, versions = fed.last_stage, state.fetched or (0,) * len(fed.clients)
    up_to_date = [one.stage == stage and version == state.version
                  for one, version in zip(state.population, versions, strict=True)]
    return tuple(one if up_to_date[c] else CurrentState(
        fed, one, state.server, fed.task_index(c), stage, one.rounds)
                 for c, one in enumerate(state.population))


def finetune(feds: Sequence[Federation], states: Sequence[State], executor: Executor,
             observers: Sequence[RunObserver] | None = None) -> list[Finetuned | None]:
    """Fine-tunes the clients of each federation after its last round; equal phases are trained together.

    Clients that took part in no round start from the server's model, or from their initial adapters. A client whose
    result is not finite stays as it was, which a note says. Records of metrics.jsonl have the label "finetune".

    Args:
        states: after the last round; they do not change.
        observers: one for each federation.

    Returns: None for a federation without fine-tuning.

    Raises:
        Interrupted: an observer requested it. Nothing is kept: fine-tuning begins again from the same states.
    """
    observers = observers or [RunObserver() for _ in feds]
    tunings = {i: _Tuning(fed, state, observer) for i, (fed, state, observer) in
               enumerate(zip(feds, states, observers, strict=True)) if fed.finetuning() is not None}
    groups: dict[PhaseSpec, list[_Tuning]] = {}
    for tuning in tunings.values():
        groups.setdefault(tuning.fed.phase(tuning.stage), []).append(tuning)
    for group in groups.values():
        _train(group, executor, _Progress(observers, sum(len(tuning.fed.clients) for tuning in group)))
    return [tunings[i].result() if i in tunings else None for i in range(len(feds))]


def after_finetuning(fed: Federation, state: State, tuned: Finetuned | None) -> State:
    """Returns the last state of a run: fine-tuning's steps are counted, and its models kept if the strategy does so."""
    if tuned is None:
        return state
    return dataclasses.replace(state, population=tuned.population if fed.strategy.finetunes else state.population,
                               client_steps=state.client_steps + tuned.client_steps,
                               train_seconds=state.train_seconds + tuned.seconds)


class _Progress(RunObserver):
    """Passes the progress of a group of clients on as that of all clients that are fine-tuned together."""

    def __init__(self, observers: Sequence[RunObserver], of: int) -> None:
        self.everyone, self.of = Observers(*observers), of
        self.steps = self.clients = 0  # of the groups before this one

    def chunk_trained(self, progress: Record) -> None:
        self.everyone.chunk_trained({**progress, "steps": self.steps + progress["steps"],
                                     "clients": self.clients + progress["clients"], "of": self.of})

    def stop_requested(self) -> int:
        return self.everyone.stop_requested()


def _train(tunings: Sequence[_Tuning], executor: Executor, progress: _Progress) -> None:
    """Fine-tunes federations with equal phases together. With a store, only some clients are in memory at a time."""
    stores = any(tuning.fed.store is not None for tuning in tunings)
    at_once = AT_ONCE if stores else max(len(tuning.fed.clients) for tuning in tunings)
    works = [tuning.works(at_once) for tuning in tunings]
    for number in range(max(map(len, works))):
        together = [(tuning, own[number]) for tuning, own in zip(tunings, works, strict=True) if number < len(own)]
        try:
            results = executor.train([work for _, work in together], progress)
        except Interrupted as stop:
            raise Interrupted(stop.signum) from None  # without the results so far, which are no part of a round
        for (tuning, work), trained in zip(together, results, strict=True):
            tuning.take(work, trained)
            progress.clients += len(trained.records)
            progress.steps += sum(record["step"] for record in trained.records.values())
        if signum := progress.stop_requested():
            raise Interrupted(signum)


class _Tuning:
    """The fine-tuning of one federation while it runs."""

    def __init__(self, fed: Federation, state: State, observer: RunObserver) -> None:
        tuned = fed.finetuning()
        assert tuned is not None
        self.fed, self.stage, self.observer, self._server = tuned, fed.last_stage, observer, state.server
        models = state.population * len(tuned.clients) if fed.unpooled else state.population
        self.population: list[AnyState] = list(models)
        self.seconds, self.client_steps = 0.0, 0

    def works(self, at_once: int) -> list[Work]:
        """Returns the clients in groups of at most `at_once`."""
        everyone, start = range(len(self.fed.clients)), tuple(self.population)
        return [Work(self.fed, CurrentAdapters(self.fed, start, everyone[i:i + at_once], self._server),
                     self.fed.settings.rounds, self.stage, LABEL) for i in range(0, len(everyone), at_once)]

    def take(self, work: Work, trained: Trained) -> None:
        """Records the results of some clients."""
        for client, record in trained.records.items():
            self.observer.client_trained(record)
            name, before = self.fed.clients[client].name, self.population[client]
            adapters = trained.adapters[client]
            if "fault" in record:
                self.observer.note(f"warning: fine-tuning: the result of {name} {record['fault']}. The client keeps "
                                   "the adapters that it had before. Lower train.lr_*, or check the client's data.")
                adapters = work.adapters[client]
            self.population[client] = stored(self.fed.store, client, ClientState(adapters, self.stage, before.rounds))
        self.seconds += trained.timings.seconds
        self.client_steps += sum(record["step"] for record in trained.records.values())

    def result(self) -> Finetuned:
        return Finetuned(self.fed, tuple(self.population), self.client_steps, self.seconds)
