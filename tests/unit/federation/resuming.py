"""Checks that a stopped run goes on to the same end."""

from __future__ import annotations

import pytest

from pilot_jax.errors import Interrupted
from pilot_jax.federation.observer import RunObserver
from pilot_jax.runs import simulate


def goes_on_to_the_same_end(config, folder, chunks):
    """Checks that a run that stops after some chunks, and is resumed, ends as a whole one, which is returned."""
    whole = simulate.simulate(config)
    with pytest.raises(Interrupted):
        simulate.simulate(config, out=folder, observers=[Stops(chunks)])
    run = simulate.simulate(config, out=folder, resume=True)
    for key in ("adapters_sha256", "bytes_up", "bytes_down", "client_steps"):
        assert run.summary[key] == whole.summary[key], key
    return whole


class Stops(RunObserver):
    """Requests the end of the run after a number of chunks."""

    def __init__(self, after):
        self.left = after

    def chunk_trained(self, progress):
        self.left -= 1

    def stop_requested(self):
        return 0 if self.left > 0 else 15
