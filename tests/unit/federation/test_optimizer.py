"""The optimizer against AdamW's formula (Loshchilov and Hutter, 2019, arXiv 1711.05101) in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pilot_jax.federation.phases import OptimizerSpec, make_optimizer

RATES = {"lora": 3e-3, "connector": 1e-2}
SHAPES = {"lora": {"a": (3, 4), "b": (5, 3)}, "connector": {"kernel": (4, 2), "bias": (2,)}}
STEPS, DECAY, EPSILON = 4, 0.1, 1e-8


def trees(rng):
    return jax.tree.map(lambda shape: rng.normal(size=shape).astype(np.float32), SHAPES,
                        is_leaf=lambda node: isinstance(node, tuple))


def adamw(tree, gradients):
    """Returns a tree after AdamW steps at constant rates, float64."""
    out = {}
    for label, leaves in tree.items():
        for name, leaf in leaves.items():
            x, m, v = leaf.astype(np.float64), 0.0, 0.0
            for step, gradient in enumerate(gradients, 1):
                g = gradient[label][name].astype(np.float64)
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                direction = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + EPSILON)
                x = x - RATES[label] * (direction + DECAY * x)
            out[label, name] = x
    return out


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("trained", [["lora", "connector"], ["lora"]])
def test_steps_are_those_of_adamw(trained, flat):
    rng = np.random.default_rng(0)
    tree, *gradients = ({label: trees(rng)[label] for label in trained} for _ in range(STEPS + 1))
    labels = {label: jax.tree.map(lambda _, label=label: label, leaves) for label, leaves in tree.items()}
    optimizer = make_optimizer(OptimizerSpec("adamw", DECAY, EPSILON, 0.0, "constant", None), labels,
                               jnp.int32(STEPS), {k: jnp.float32(v) for k, v in RATES.items()}, flat)
    state, now = optimizer.init(tree), tree
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, now)
        now = optax.apply_updates(now, updates)
    for (label, name), expected in adamw(tree, gradients).items():
        np.testing.assert_allclose(now[label][name], expected, rtol=2e-5, atol=2e-6)
