"""The data sets that the package generates: what `data.path` names them, and the section of the config they read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from pilot_jax.config import DataConfig
from pilot_jax.data.llava.sample import Sample
from pilot_jax.embedded.scenarios import SCENARIOS, scenario_clients, scene_samples
from pilot_jax.real.emoji_tasks import emoji_samples


@dataclasses.dataclass(frozen=True)
class Generated:
    """A generated data set, as functions of the config's section `data`."""

    samples: Callable[[DataConfig], Iterator[Sample]]
    num_tasks: Callable[[DataConfig], int]  # without generating the samples


def _digits(data: DataConfig) -> Iterator[Sample]:
    own = data.digits
    return scene_samples(scenario_clients(own.scenario, own.train, own.validation, own.test, own.heterogeneity,
                                          own.clients_per_task), own.seed)


GENERATED = {
    "digits": Generated(_digits, lambda data: len(SCENARIOS[data.digits.scenario][0])),
    "emoji": Generated(lambda data: emoji_samples(data.emoji), lambda data: len(data.emoji.tasks)),
}
