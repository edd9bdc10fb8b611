"""Tests of configs that are made in Python rather than read from a file."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

import pilot_jax
from pilot_jax.config import parse_config


def test_a_strategy_by_name_has_the_keys_of_its_class():
    made = pilot_jax.Config(strategy={"name": "pilot", "ata": {"neighbors": 1}})
    assert made == parse_config({"strategy": {"name": "pilot", "ata": {"neighbors": 1}}})
    assert made.strategy.ata.neighbors == 1
    assert pilot_jax.Config(strategy={"projector": "trained"}) == pilot_jax.Config()  # the default strategy's keys


@pytest.mark.parametrize(("section", "message"), [
    ({"name": "pilott"}, "Did you mean 'pilot'"), ({"name": "pilot", "neighbours": 1}, "not permitted"),
    ({"name": "mine:Own"}, "a file alone imports no code"), (3, "valid dictionary")])
def test_a_wrong_strategy_is_refused(section, message):
    with pytest.raises(ValidationError, match=message):
        pilot_jax.Config(strategy=section)
