"""Random streams: their keys against those of JAX."""

import jax
import numpy as np
import pytest

from pilot_jax.federation.randomness import client_generator, key_data

SEEDS = [0, 7, 2**31, 2**32 - 1, 2**33 + 5]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("numbers", [(), (0,), (2**32 - 1,), (0x696E6974, 3, 2**31)])
def test_keys_are_those_of_jax(seed, numbers):
    key = jax.random.key(seed)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    np.testing.assert_array_equal(key_data(seed, *numbers), jax.random.key_data(key))


def test_streams_depend_on_every_part_of_their_name():
    names = [(0, "a", 1, "stage1"), (1, "a", 1, "stage1"), (0, "b", 1, "stage1"), (0, "a", 2, "stage1"),
             (0, "a", 1, "stage2")]
    assert len({client_generator(*name).integers(1 << 60) for name in names}) == len(names)
