"""The ownership table of a config with sizes, from shapes alone: nothing is allocated, no weights are read."""

from __future__ import annotations

from typing import Any

import jax

from pilot_jax.config import Config
from pilot_jax.data.llava.reading import read_samples
from pilot_jax.embedded.scenarios import SCENARIOS
from pilot_jax.federation.roles import num_bytes, num_parameters
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.models.checkpoints.tensor_names import base_shapes
from pilot_jax.models.pretrained import read_shapes

# The paper's names of the frozen parts, and ours.
BASE_SUBTREES = {"vision_tower": "vision_tower", "language_model": "decoder"}


def count_tasks(config: Config) -> int:
    if config.data.path == "digits":
        return len(SCENARIOS[config.data.digits.scenario][0])
    return len({s.task for s in read_samples(config.data.path, config.data.image_root, config.data.file_names,
                                           config.data.limits)})


def ownership_table(config: Config) -> list[dict[str, Any]]:
    """One dict per subtree: subtree, a column per stage, scope, aggregated by, parameters, bytes."""
    model = read_shapes(config.model)[0]
    strategy = make_strategy(config.strategy, config.federation.schedule)
    base, tasks = base_shapes(model), count_tasks(config)
    adapters = jax.eval_shape(
        lambda key, projector: strategy.initial_adapters(key, projector, model, config.model.lora.rank, tasks),
        jax.eval_shape(lambda: jax.random.key(0)), base["projector"])
    roles, stages = strategy.roles(), tuple(dict.fromkeys(strategy.first_stages))
    roles.check(adapters)
    rows = []
    for role in roles.rows:
        tree = base[BASE_SUBTREES[role.subtree]] if role.scope == "base" else adapters[role.subtree]
        rows.append({"subtree": role.subtree} | {stage: role.modes[stage] for stage in stages} | {
            "scope": role.scope, "aggregated by": role.aggregated_by, "parameters": num_parameters(tree),
            "bytes": num_bytes(tree)})
    return rows
