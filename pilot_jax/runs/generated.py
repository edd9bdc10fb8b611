"""The data sets that the package generates: what `data.path` names them, and the section of the config they read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable

from pilot_jax.cache import Cache
from pilot_jax.config import DataConfig
from pilot_jax.data.llava.sample import Sample
from pilot_jax.embedded.scenarios import SCENARIOS, clients_of, lazy_samples, scene_samples
from pilot_jax.programs import surroundings
from pilot_jax.real.emoji_tasks import emoji_samples


@dataclasses.dataclass(frozen=True)
class Generated:
    """A generated data set, as functions of the config's section `data`."""

    samples: Callable[[DataConfig, Cache | None], Iterable[Sample]]  # the cache may keep what they are made from
    num_tasks: Callable[[DataConfig], int]  # without generating the samples


def _digits(data: DataConfig, kept: Cache | None) -> Iterable[Sample]:
    own = data.digits
    specs = clients_of(own.scenario, (own.train, own.validation, own.test), own.heterogeneity, own.look, own.wording,
                       own.labels, own.clients_per_task)
    if kept is None:
        return scene_samples(specs, own.seed)
    key = f"digits {surroundings()} {specs} {own.seed}"
    content = kept.read(key)
    samples = list(lazy_samples(specs, own.seed, None if content is None else json.loads(bytes(content))))
    if content is None:
        kept.write(key, [json.dumps([sample.turns for sample in samples]).encode()])
    return samples


GENERATED = {
    "digits": Generated(_digits, lambda data: len(SCENARIOS[data.digits.scenario][0])),
    "emoji": Generated(lambda data, kept: emoji_samples(data.emoji), lambda data: len(data.emoji.tasks)),
}
