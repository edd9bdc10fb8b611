"""The roster of the clients whose data are on this machine."""

from __future__ import annotations

from collections import defaultdict

from pilot_jax.config import Config
from pilot_jax.data.arrays import training_length
from pilot_jax.data.conversations import Encoded, encode
from pilot_jax.data.roster import Roster, roster_of
from pilot_jax.models.checkpoints.processors import has_tokenizer, load_tokenizer
from pilot_jax.runs.prepare import load_samples, outline


def roster_here(config: Config) -> Roster:
    """Returns the roster of the clients at `data.path`, with their lengths in tokens if the base has a tokenizer here.

    Raises:
        InputError: there are no data or no base model, or a sample is wrong.
    """
    samples, run = load_samples(config), outline(config)
    if not has_tokenizer(run.text_directory):
        return roster_of(samples)
    encoded, tokenizer = defaultdict[str, list[Encoded]](list), load_tokenizer(run.text_directory)
    for sample in samples:
        if sample.split == "train":
            encoded[sample.client].append(encode(tokenizer, sample.turns, run.data.template, run.spec.num_image_tokens,
                                                 run.data.max_length))
    return roster_of(samples, {name: training_length(own) for name, own in encoded.items()})
