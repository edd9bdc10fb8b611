"""Tests of the buckets of lengths: there are few, and padding is small."""

from __future__ import annotations

from pilot_jax.data.arrays import bucket_shapes


def test_buckets_pad_little_and_are_few():
    shapes = bucket_shapes({"a": (64, 12), "b": (72, 8), "c": (80, 28), "d": (64, 16), "e": (640, 4)}, 1.2)
    assert shapes == {"a": (72, 16), "d": (72, 16), "b": (72, 16), "c": (80, 28), "e": (640, 4)}
    many = bucket_shapes({str(n): (n, 4) for n in range(64, 2049, 8)}, 1.2)
    assert len(set(many.values())) <= 20
    assert all(many[str(n)][0] >= n and many[str(n)][0] <= 1.2 * n for n in range(64, 2049, 8))
