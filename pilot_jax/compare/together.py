"""Trains and scores several setups of one program together, as more clients of the same phases."""

from __future__ import annotations

from collections.abc import Sequence

from pilot_jax.data.arrays import Prompts
from pilot_jax.evaluation.finetune import Finetuned, finetune
from pilot_jax.evaluation.personalised import forgetting
from pilot_jax.evaluation.scores import Scores, final_scores
from pilot_jax.federation.observer import Observers, RunObserver
from pilot_jax.federation.rounds import run_round
from pilot_jax.federation.state import State
from pilot_jax.runs.prepare import Setup, initial_state


def run_all(setups: Sequence[Setup], observers: Sequence[RunObserver] | None = None,
            progress: RunObserver | None = None) -> list[State | None]:
    """Trains all rounds of several setups of the same program together.

    Args:
        observers: one for each setup.
        progress: called after every chunk, as long as any setup is left.

    Returns the final state of each setup, or None if it diverged."""
    feds = [setup.federation for setup in setups]
    observers = observers or [RunObserver() for _ in feds]
    states: list[State | None] = [initial_state(fed) for fed in feds]
    for _ in range(feds[0].settings.rounds):
        alive = {i: state for i, state in enumerate(states) if state is not None}
        if alive:
            after = run_round([feds[i] for i in alive], list(alive.values()), setups[0].executor,
                              _watched([observers[i] for i in alive], progress), survive=True)
            for i, state in zip(alive, after, strict=True):
                states[i] = state
    return states


def finetune_all(setups: Sequence[Setup], states: Sequence[State | None],
                 observers: Sequence[RunObserver], progress: RunObserver | None = None) -> list[Finetuned | None]:
    """Fine-tunes the clients of several setups together, after their last round; None for a setup without it, and for
    one that diverged. `progress` is that of `run_all`."""
    alive = {i: state for i, state in enumerate(states) if state is not None}
    found = finetune([setups[i].federation for i in alive], list(alive.values()), setups[0].executor,
                     _watched([observers[i] for i in alive], progress))
    by_setup = dict(zip(alive, found, strict=True))
    return [by_setup.get(i) for i in range(len(setups))]


def _watched(observers: list[RunObserver], progress: RunObserver | None) -> list[RunObserver]:
    """Returns the observers, of which the first also calls `progress`; all are told of every chunk."""
    if progress is None or not observers:
        return observers
    return [Observers(observers[0], progress), *observers[1:]]


def scores_of_all(setups: Sequence[Setup], states: Sequence[State | None], tuned: Sequence[Finetuned | None],
                  split: str) -> list[Scores]:
    """Returns each setup's scores; without any client for a setup that diverged."""
    alive = {i: state for i, state in enumerate(states) if state is not None}
    found = final_scores([setups[i].evaluation for i in alive], list(alive.values()), [tuned[i] for i in alive], split)
    by_setup = dict(zip(alive, found, strict=True))
    return [by_setup.get(i, Scores(None, {}, None)) for i in range(len(setups))]


def captions_of_all(setups: Sequence[Setup], states: Sequence[State | None],
                    prompts: Sequence[Prompts]) -> list[list[float]]:
    """Returns each setup's scores by client on the base model's pretraining captions.

    The list is empty for a setup that diverged, and if there are no `prompts`."""
    alive = {i: state.population for i, state in enumerate(states) if state is not None and prompts}
    found = forgetting([setups[i].evaluation for i in alive], list(alive.values()),
                       [prompts[i] for i in alive]) if alive else []
    by_setup = dict(zip(alive, found, strict=True))
    return [by_setup.get(i, []) for i in range(len(setups))]
