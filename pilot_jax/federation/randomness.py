"""Random streams of clients that do not depend on which other clients take part."""

from __future__ import annotations

import hashlib

import numpy as np

ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of Threefry's rounds, in turns of four


def client_generator(seed: int, client: str, round_: int, phase: str) -> np.random.Generator:
    """Returns a client's random stream: fold_in(root, client, round, phase).

    The key is made of names, not positions, so that a client's draws depend neither on chunks and devices, nor on the
    other clients, nor on whether the run was resumed.
    """
    return np.random.default_rng(key_data(seed, *(int.from_bytes(hashlib.sha256(part.encode()).digest()[:4], "big")
                                                  for part in (client, str(round_), phase))))


def key_data(seed: int, *numbers: int) -> np.ndarray:
    """Returns the data, uint32 [2], of JAX's key for a seed into which numbers below 2³² are folded one after another.

    JAX compiles a program for it, which takes a new process longer than everything else that it does with keys.
    """
    key = np.asarray([0, seed & 0xFFFFFFFF], np.uint32)  # without 64-bit types, JAX takes 32 bits of a seed too
    for number in numbers:
        key = threefry2x32(key, np.asarray([0, number], np.uint32))
    return key


def threefry2x32(key: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Returns the random bits of a key and a counter, all uint32 [2] (Threefry with 20 rounds: Salmon et al., "Parallel
    random numbers: as easy as 1, 2, 3", SC 2011).
    """
    keys = (*key, key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    with np.errstate(over="ignore"):  # sums are modulo 2³²
        x, y = count[0] + keys[0], count[1] + keys[1]
        for turn in range(5):
            for rotation in ROTATIONS[turn % 2]:
                x = x + y
                y = (y << np.uint32(rotation) | y >> np.uint32(32 - rotation)) ^ x
            x, y = x + keys[(turn + 1) % 3], y + keys[(turn + 2) % 3] + np.uint32(turn + 1)
    return np.asarray([x, y], np.uint32)
