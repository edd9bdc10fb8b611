"""Streams of random numbers that do not depend on who else takes part."""

from __future__ import annotations

import hashlib

import jax
import numpy as np


def client_generator(seed: int, client: str, round_: int, phase: str) -> np.random.Generator:
    """A client's stream: fold_in(root, client, round, phase).

    Names, not positions, go in, so that a client's draws depend neither on chunks and devices, nor on the other
    clients, nor on whether the run was resumed.
    """
    key = jax.random.key(seed)
    for part in (client, str(round_), phase):
        key = jax.random.fold_in(key, int.from_bytes(hashlib.sha256(part.encode()).digest()[:4], "big"))
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))
