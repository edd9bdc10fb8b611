"""Tests which samples are held out: shares, every client, the same picture in one split, and no change by more data."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from PIL import Image

from pilot_jax.config import HoldOutConfig, parse_config
from pilot_jax.data.division import client_faults, missing_splits, splits_of
from pilot_jax.data.hold_out import held_out
from pilot_jax.data.llava.sample import Sample
from pilot_jax.errors import InputError

SHARES = HoldOutConfig(validation=0.1, test=0.2)


def sample(client, number, picture=None, split="train"):
    image = None if picture is None else Image.new("L", (1, 1), picture)
    return Sample(f"{client}{number}", image, (("human", f"{client} {number}?"), ("gpt", "a")), "t", client, split, "f")


def splits(samples, shares=SHARES):
    return {s.id: s.split for s in held_out(samples, shares)}


def test_shares_are_about_those_of_the_config():
    count = Counter(splits([sample("a", i) for i in range(2000)]).values())
    assert abs(count["test"] - 400) < 80 and abs(count["validation"] - 200) < 60  # more than four standard deviations


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_client_gets_each_split_if_it_has_enough(size):
    out = held_out([sample(f"c{c}", i) for c in range(40) for i in range(size)], SHARES)
    assert not client_faults(out)
    wanted = {1: {"train"}, 2: {"train", "test"}}.get(size, {"train", "validation", "test"})
    assert all(wanted <= has for has in splits_of(out).values())


def test_more_samples_and_another_order_move_none_but_those_moved_for_a_small_client():
    few = [sample("a", i) for i in range(200)]
    before, after = splits(few), splits([sample("b", 0), *reversed([sample("a", i) for i in range(400)])])
    assert {key: after[key] for key in before} == before


def test_the_same_picture_is_in_one_split():
    """Forty clients ask different things about the same 60 pictures."""
    samples = [sample(f"c{c}", p, p) for c in range(40) for p in range(60)]
    by_picture = {}
    for one in held_out(samples, SHARES):
        by_picture.setdefault(one.image.getpixel((0, 0)), set()).add(one.split)
    assert all(len(found) == 1 for found in by_picture.values()) and len(set.union(*by_picture.values())) == 3


@pytest.mark.parametrize("seed", range(20))
def test_few_pictures_that_clients_share_leave_each_client_something_to_learn(seed):
    """Each pair of clients shares pictures, so that a move for one client moves the other's."""
    samples = [sample(f"c{c}", p, (p * 7 + seed * 11 + c // 2 * 3) % 256) for c in range(12) for p in range(3)]
    out = held_out(samples, SHARES)
    assert not client_faults(out)
    by_picture = {}
    for one in out:
        by_picture.setdefault(one.image.getpixel((0, 0)), set()).add(one.split)
    assert all(len(found) == 1 for found in by_picture.values())


def test_splits_of_the_data_stay():
    own = [sample("a", i) for i in range(30)] + [sample("a", 99, split="test")]
    other = [sample("b", i) for i in range(30)]
    out = held_out([*own, *other], SHARES)
    assert [s.id for s in out if s.client == "a" and s.split == "test"] == ["a99"]
    assert {s.split for s in out if s.client == "a"} == {"train", "validation", "test"} == splits_of(out)["b"]
    with pytest.raises(InputError, match=r"data\.hold_out\.test: every client has test samples in the data already"):
        held_out(own, SHARES)
    assert held_out(own, HoldOutConfig()) is own


def test_shares_must_leave_training_samples():
    with pytest.raises(InputError, match="validation and test together must be less than 1"):
        parse_config({"data": {"hold_out": {"validation": 0.5, "test": 0.5}}})


def test_it_is_said_who_has_no_held_out_data():
    none = {"a": {"train"}, "b": {"train"}}
    assert missing_splits({"a": {"train", "test"}}, 0) == []
    text, = missing_splits(none, 0)
    assert "no client has test samples" in text and "data.hold_out.test" in text
    assert "eval.every: 2 scores nothing" in missing_splits(none, 2)[1]
    text, = missing_splits(none | {"c": {"train", "test"}}, 0)
    assert "2 of 3 clients have no test samples" in text and "first: a" in text


def test_a_missing_picture_is_named(tmp_path):
    gone = dataclasses.replace(sample("a", 0), image=tmp_path / "gone.png")
    with pytest.raises(InputError, match="f: image: cannot be read"):
        held_out([gone], SHARES)
