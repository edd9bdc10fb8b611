"""The ownership table of a config with sizes, from shapes alone: nothing is allocated, no weights are read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pilot_jax.config import Config
from pilot_jax.data.digits import SCENARIOS
from pilot_jax.data.llava import read_samples
from pilot_jax.federation.roles import num_bytes, num_parameters
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.models.config import VlmConfig, read_vlm_config
from pilot_jax.models.pretrained import model_directory
from pilot_jax.models.vlm import Vlm


def base_shapes(config: VlmConfig) -> dict[str, Any]:
    """Shapes of the frozen base: vision_tower, language_model, projector."""
    module, v = Vlm(config), config.vision
    key = jax.eval_shape(lambda: jax.random.key(0))
    pixels = jax.ShapeDtypeStruct((1, v.image_size, v.image_size, 3), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    tower = jax.eval_shape(lambda k, p: module.init(k, p, method="features"), key, pixels)
    text = jax.eval_shape(lambda k, i: module.init(k, i, jnp.ones_like(i), None, method="logits"), key, ids)

    def layer(d_in: int) -> dict:
        shapes = {"kernel": jax.ShapeDtypeStruct((d_in, config.text.hidden_size), jnp.float32)}
        if config.projector_bias:
            shapes["bias"] = jax.ShapeDtypeStruct((config.text.hidden_size,), jnp.float32)
        return shapes

    return {"vision_tower": tower["params"]["vision_tower"], "language_model": text["params"]["decoder"],
            "projector": {"linear_1": layer(v.hidden_size), "linear_2": layer(config.text.hidden_size)}}


def count_tasks(config: Config) -> int:
    if config.data.path == "digits":
        return len(SCENARIOS[config.data.digits.scenario][0])
    return len({s.task for s in read_samples(config.data.path, config.data.image_root)})


def ownership_table(config: Config) -> list[dict[str, Any]]:
    """One dict per subtree: subtree, a column per stage, scope, aggregated by, parameters, bytes."""
    model = read_vlm_config(model_directory(config.model.path))
    strategy = make_strategy(config.strategy, config.federation.schedule)
    base, tasks = base_shapes(model), count_tasks(config)
    adapters = jax.eval_shape(
        lambda key, projector: strategy.initial_adapters(key, projector, model, config.model.lora.rank, tasks),
        jax.eval_shape(lambda: jax.random.key(0)), base["projector"])
    roles, stages = strategy.roles(), tuple(dict.fromkeys(strategy.first_stages))
    roles.check(adapters)
    rows = []
    for role in roles.rows:
        tree = base[role.subtree] if role.scope == "base" else adapters[role.subtree]
        rows.append({"subtree": role.subtree} | {stage: role.modes[stage] for stage in stages} | {
            "scope": role.scope, "aggregated by": role.aggregated_by, "parameters": num_parameters(tree),
            "bytes": num_bytes(tree)})
    return rows
