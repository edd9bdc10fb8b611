"""Builds a config's ownership table, with sizes, from shapes. No arrays are allocated and no weights are read."""

from __future__ import annotations

from typing import Any

from pilot_jax.config import Config
from pilot_jax.federation.roles import num_bytes, num_parameters
from pilot_jax.models.checkpoints.tensor_names import base_shapes
from pilot_jax.models.pretrained import plain_connector
from pilot_jax.planning.estimate import adapter_shapes
from pilot_jax.runs.prepare import count_tasks, outline

# The frozen parts of the base model by their names in the ownership table, with their names in the base's tree.
BASE_SUBTREES = {"vision_tower": "vision_tower", "language_model": "decoder", "projector": "projector"}


def ownership_table(config: Config) -> list[dict[str, Any]]:
    """Returns one dict per subtree, with its name, its mode in each stage, scope, aggregation, parameters and bytes.

    Parts that the base does not have, as a language model alone has no vision tower, are left out.
    """
    run = outline(config)
    base = base_shapes(run.spec)
    adapters = adapter_shapes(run, plain_connector(base), count_tasks(config))
    roles, stages = run.strategy.ownership(), tuple(dict.fromkeys(run.strategy.first_stages))
    roles.check(adapters)
    rows = []
    for role in roles.rows:
        if role.scope == "base" and BASE_SUBTREES[role.subtree] not in base:
            continue
        tree = base[BASE_SUBTREES[role.subtree]] if role.scope == "base" else adapters[role.subtree]
        modes = dict.fromkeys(stages, "frozen") if role.scope == "base" else role.modes
        rows.append({"subtree": role.subtree} | {stage: modes[stage] for stage in stages} | {
            "scope": role.scope, "aggregated by": role.aggregated_by, "parameters": num_parameters(tree),
            "bytes": num_bytes(tree)})
    return rows
