"""Several LoRA in each linear layer, the *experts*, which a router mixes token by token.

The first expert is the client's own LoRA, the others are its *bank*. One layer of a target is

    y = x·W + Σ_e g_e(x)·(α/r)·x·A_eᵀ·B_eᵀ        e = 0 (the own LoRA), 1, …, E (the bank)

so that no sum of W and B·A computes it: the gates g differ from token to token. `models.lora.assembled` chooses this
form for a client that has a router, when the program is traced; other programs have nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree


def init_bank(lora: Mapping[str, PyTree], count: int) -> dict[str, PyTree]:
    """Returns a bank of `count` experts that add nothing: the LoRA's A, and B = 0.

    Leaves are a [layers, count, R, d_in] and b [layers, count, d_out, R], of a LoRA a [layers, R, d_in], b [layers,
    d_out, R].
    """
    def repeated(leaf: jax.Array) -> jax.Array:
        return jnp.repeat(leaf[:, None], count, axis=1)

    return {"layers": {name: {"a": repeated(pair["a"]), "b": repeated(jnp.zeros_like(pair["b"]))}
                       for name, pair in lora["layers"].items()}}


def init_router(key: Key[Array, ""], lora: Mapping[str, PyTree], gates: int) -> dict[str, jax.Array]:
    """Returns a router for each target of a LoRA, float32 [layers, gates, d_in], uniform in ±1/√d_in, without bias."""
    out = {}
    for index, (name, pair) in enumerate(sorted(lora["layers"].items())):
        layers, _, d_in = pair["a"].shape
        out[name] = jax.random.uniform(jax.random.fold_in(key, index), (layers, gates, d_in), jnp.float32,
                                       -d_in**-0.5, d_in**-0.5)
    return out


def with_experts(own: Mapping[str, PyTree], adapters: Mapping[str, PyTree]) -> dict[str, PyTree]:
    """Returns a LoRA together with the client's `expert_bank`, `expert_router` and, if there is one, `expert_slots`.

    Each target then has the leaves a, b, bank_a, bank_b, router and slots of `mixed`, with the axis `layers` first.
    """
    bank, router = adapters["expert_bank"]["layers"], adapters["expert_router"]
    layers: dict[str, dict[str, jax.Array]] = {}
    for name, pair in own["layers"].items():
        layers[name] = {"a": pair["a"], "b": pair["b"], "bank_a": bank[name]["a"], "bank_b": bank[name]["b"],
                        "router": router[name]}
        if "expert_slots" in adapters:
            table = adapters["expert_slots"]["table"]
            layers[name]["slots"] = jnp.broadcast_to(table, (pair["a"].shape[0], *table.shape))
    return {"layers": layers}


def is_mixture(layers: Mapping[str, Mapping[str, PyTree]]) -> bool:
    """Returns whether the targets of an assembled LoRA have several experts."""
    return any("router" in leaves for leaves in layers.values())


def gates(x: Float[Array, "tokens d_in"], router: Float[Array, "slots d_in"],
          slots: Float[Array, "slots experts"] | None = None) -> Float[Array, "tokens _experts"]:
    """Returns the weight of each expert for each token, float32; the weights of a token sum to 1.

    Without a table of slots, the router has one row for each expert, and the weights are the softmax of x·routerᵀ. With
    it, an expert can have several rows: the table's entry (s, e) is 1 where row s belongs to expert e, and rows of
    zeros are out of use. Of the rows in use, those with the M largest logits are kept, M the number of experts that
    have a row; the softmax is over these, and an expert's weight is the sum over its rows. Of equal logits, that of the
    first row is taken as the largest.
    """
    logits = jnp.matmul(x, router.T.astype(x.dtype), preferred_element_type=jnp.float32)
    if slots is None:
        return jax.nn.softmax(logits, axis=-1)
    used, most = jnp.any(slots > 0, axis=1), jnp.sum(jnp.any(slots > 0, axis=0))
    logits = jnp.where(used, logits, -jnp.inf)
    first = jnp.tril(jnp.ones((len(slots),) * 2, bool), -1)  # [s, t]: row t comes before row s
    above = (logits[:, None, :] > logits[:, :, None]) | (first & (logits[:, None, :] == logits[:, :, None]))
    kept = used & (jnp.sum(above, axis=-1) < most)
    weights = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=-1)
    return jnp.matmul(weights, slots, precision=jax.lax.Precision.HIGHEST)


def mixed(x: Float[Array, "tokens d_in"], leaves: Mapping[str, Float[Array, ...]],
          scale: float) -> Float[Array, "tokens _d_out"]:
    """Returns Σ_e g_e(x)·scale·x·A_eᵀ·B_eᵀ, what the experts of one target add to x·W.

    Args:
        leaves: of one layer: a [R, d_in] and b [d_out, R], the own LoRA; bank_a [E, R, d_in] and bank_b [E, d_out, R];
            router [G, d_in] and, if experts have several rows of it, slots [G, 1 + E] (see `gates`).
        scale: α/r, the same for all experts.
    """
    a = jnp.concatenate([leaves["a"][None], leaves["bank_a"]]).astype(x.dtype)  # [1 + E, R, d_in]
    b = (jnp.concatenate([leaves["b"][None], leaves["bank_b"]]) * scale).astype(x.dtype)
    experts, rank, _ = a.shape
    weights = gates(x, leaves["router"], leaves.get("slots")).astype(x.dtype)
    inner = (x @ a.reshape(experts * rank, -1).T).reshape(-1, experts, rank) * weights[:, :, None]
    return inner.reshape(-1, experts * rank) @ b.transpose(0, 2, 1).reshape(experts * rank, -1)
