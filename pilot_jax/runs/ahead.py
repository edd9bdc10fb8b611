"""What a run does before its first round, so that it does not wait for it later."""

from __future__ import annotations

import contextlib
import importlib
import threading

import jax

from pilot_jax.data.features import compute_features
from pilot_jax.data.tokenizer import LateTokenizer
from pilot_jax.errors import InputError
from pilot_jax.federation.state import State
from pilot_jax.runs.prepare import Setup


def compute_all_features(setup: Setup) -> None:
    """Computes the features of all images before the run begins, so that an unreadable image is found at once.

    With client states on disk (`system.store`) or several processes, features are computed when a client trains."""
    if setup.federation.store is None and jax.process_count() == 1:
        compute_features([f for c in setup.evaluation.clients
                          for f in (*(p.features for p in c.evaluation.values()), c.features)], 1)


def compile_first_round(setup: Setup, state: State) -> None:
    """Starts to compile the programs of the first round in a thread, while the features are computed."""
    fed = setup.federation
    if fed.store is None:
        members = fed.members(state.round)
        setup.executor.compile_ahead(fed, state.round, {c: state.population[c].adapters for c in members})


def import_later(setup: Setup, saves: bool) -> None:
    """Starts to load in a thread, while the first chunk of clients is trained, what is not needed before.

    Args:
        saves: whether snapshots will be written, for which there is a library.
    """
    tokenizer = getattr(setup.evaluation.decoder, "tokenizer", None)

    def work() -> None:
        if saves:
            importlib.import_module("orbax.checkpoint")
        if isinstance(tokenizer, LateTokenizer):
            with contextlib.suppress(InputError):  # it is raised where the tokenizer is used
                tokenizer.loaded()

    threading.Thread(target=work, daemon=True).start()
