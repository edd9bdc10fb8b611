"""Random streams of clients that do not depend on which other clients take part."""

from __future__ import annotations

import hashlib

import jax
import numpy as np


def client_generator(seed: int, client: str, round_: int, phase: str) -> np.random.Generator:
    """Returns a client's random stream: fold_in(root, client, round, phase).

    The key is made of names, not positions, so that a client's draws depend neither on chunks and devices, nor on the
    other clients, nor on whether the run was resumed.
    """
    key = jax.random.key(seed)
    for part in (client, str(round_), phase):
        key = jax.random.fold_in(key, int.from_bytes(hashlib.sha256(part.encode()).digest()[:4], "big"))
    return np.random.default_rng(np.asarray(jax.random.key_data(key)))
