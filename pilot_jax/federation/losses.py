"""The losses of Pilot: L_ce, L_d, L_b, L_z, and their sum per stage. All in float32.

`weight` [B] is 1 for real samples and 0 for padding: padding enters no sum and no count. `count` is the sum of the
weights of a whole batch, of which the arguments are a part: the parts' losses then add up to the batch's. None: the
arguments are all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Shaped

from pilot_jax.config import TrainConfig
from pilot_jax.kernels.pointwise import normalized, row_sum

AnyArray = Array | np.ndarray


Count = Float[Array, ""] | None


def _mean(values: Float[Array, "*rows"], weight: Float[AnyArray, "*rows"], count: Count = None) -> Float[Array, ""]:
    """Returns the weighted sum / `count`, by default the weighted mean; 0 where all weights are 0."""
    return jnp.sum(values * weight) / jnp.maximum(jnp.sum(weight) if count is None else count, 1.0)


def cross_entropy(logits: Float[AnyArray, "B A V"], targets: Int[AnyArray, "B A"],
                  weight: Float[AnyArray, "B A"], count: Count = None) -> Float[Array, ""]:
    """L_ce: mean next-token cross-entropy over supervised tokens."""
    return _mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets), weight, count)


def _grams(x_t: Float[Array, "B N C"], x_s: Float[Array, "B N C"]) -> Float[Array, " B"]:
    """‖x_tᵀ x_s‖_F² per image = Σ (x_t x_tᵀ ∘ x_s x_sᵀ): N×N arrays, never C×C."""
    gram_t = jnp.einsum("bnc,bmc->bnm", x_t, x_t)
    gram_s = jnp.einsum("bnc,bmc->bnm", x_s, x_s)
    return jnp.sum(gram_t * gram_s, axis=(1, 2))


def difference_loss(x_t: Float[AnyArray, "B N C"], x_s: Float[AnyArray, "B N C"], weight: Float[AnyArray, " B"],
                    mode: str = "token_cosine", center: bool = False, count: Count = None) -> Float[Array, ""]:
    """L_d (paper §3.2): how far the task's and the client's features share directions; float32.

    Args:
        mode: raw: ‖x_tᵀ x_s‖_F² per image, the paper's formula. token_cosine: the same of tokens divided by √(‖x‖²+ε²),
            ε = 0.1·stop_gradient(mean ‖x_t‖), divided by N² (plain cosines of near-zero tokens are ill-conditioned,
            and x_s starts at zero). flat: as in the authors' code, each image is one vector;
            the mean of the squared inner products over the (N·C)² pairs of features, by the B×B Gram, which a part of
            a batch does not have.
        center: subtract each image's mean token first.
    """
    t, s = jnp.asarray(x_t, jnp.float32), jnp.asarray(x_s, jnp.float32)
    if center:
        t, s = (x - jnp.mean(x, axis=1, keepdims=True) for x in (t, s))
    if mode == "raw":
        return _mean(_grams(t, s), weight, count)
    if mode == "token_cosine":
        # Per image, so that no sample's loss depends on its neighbours in the batch.
        norms = jnp.sqrt(row_sum(jax.lax.stop_gradient(t) ** 2))
        eps2 = (0.1 * jnp.mean(norms, axis=1, keepdims=True)) ** 2 + 1e-30
        return _mean(_grams(normalized(t, eps2), normalized(s, eps2)), weight, count) / t.shape[1]**2
    if mode == "flat":
        masked = jnp.sqrt(weight)[:, None, None]  # each Gram entry then carries √(w_a·w_b)
        a, b = (x * masked for x in (t, s))
        gram_a, gram_b = (jnp.einsum("anc,bnc->ab", x, x) for x in (a, b))
        return jnp.sum(gram_a * gram_b) / float(t.shape[1] * t.shape[2]) ** 2
    raise ValueError(f"difference loss mode {mode!r} is not known")


def balance_loss(router_logits: Float[AnyArray, "B N T"], weight: Float[AnyArray, " B"],
                 count: Count = None) -> Float[Array, ""]:
    """L_b = T·Σ_i f_i·P̄_i per image, averaged (Fedus et al., 2022, eq. 4); 1 = balanced."""
    experts = router_logits.shape[-1]
    probs = jax.nn.softmax(router_logits, axis=-1)
    share = jnp.mean(jax.nn.one_hot(jnp.argmax(probs, axis=-1), experts), axis=1)  # f, no gradient
    return _mean(experts * jnp.sum(share * jnp.mean(probs, axis=1), axis=-1), weight, count)


def z_loss(router_logits: Float[AnyArray, "B N T"], weight: Float[AnyArray, " B"],
           count: Count = None) -> Float[Array, ""]:
    """L_z: mean over tokens of logsumexp(logits)² (Zoph et al., 2022, eq. 5)."""
    return _mean(jnp.mean(jax.nn.logsumexp(router_logits, axis=-1) ** 2, axis=-1), weight, count)


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """Weights of a stage's terms beside L_ce; the weights of another stage's terms are 0."""

    difference: float = 0.0  # λ0
    difference_mode: str = "token_cosine"
    center: bool = False
    balance: float = 0.0  # λ1
    z: float = 0.0  # λ2


def loss_weights(train: TrainConfig, stage: str) -> LossWeights:
    """Returns the weights of a stage's own terms. The others stay 0, so that they cause no new compilation."""
    if stage == "stage1":
        return LossWeights(difference=train.lambda_d, difference_mode=train.ld_mode, center=train.ld_center)
    if stage == "stage2":
        return LossWeights(balance=train.lambda_b, z=train.lambda_z)
    return LossWeights()


def batch_counts(batch: Mapping[str, Shaped[AnyArray, "k B ..."]]) -> tuple[Float[Array, " k"], Float[Array, " k"]]:
    """Returns the numbers of supervised tokens and of images in the batches of k clients, leaves [k, B, …]."""
    return jnp.sum(batch["target_weights"], axis=(1, 2)), jnp.sum(batch["has_image"], axis=1)


def stage_loss(logits: Float[AnyArray, "B A V"], aux: Mapping[str, Float[AnyArray, "B N _"]],
               batch: Mapping[str, Shaped[AnyArray, "B ..."]], weights: LossWeights,
               counts: tuple[Float[Array, ""], Float[Array, ""]] | None = None,
               ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Returns the loss of one client's batch, and its named terms (float32 scalars).

    Args:
        aux: what the stage's connector returns in addition to its features: x_t, x_s [B, N, C] (stage 1),
            router_logits [B, N, T] (stage 2), or nothing.
        batch: target_ids, target_weights [B, A] and has_image [B], both already 0 for padding samples.
        counts: the numbers of supervised tokens and of images of the batch of which `batch` is a part; None: it is
            whole.
    """
    tokens, images = counts or (None, None)
    terms = {"ce": cross_entropy(logits, batch["target_ids"], batch["target_weights"], tokens)}
    loss, has_image = terms["ce"], batch["has_image"]
    if "x_s" in aux:
        terms["difference"] = difference_loss(aux["x_t"], aux["x_s"], has_image, weights.difference_mode,
                                              weights.center, images)
        loss = loss + weights.difference * terms["difference"]
    if "router_logits" in aux:
        terms["balance"] = balance_loss(aux["router_logits"], has_image, images)
        terms["z"] = z_loss(aux["router_logits"], has_image, images)
        loss = loss + weights.balance * terms["balance"] + weights.z * terms["z"]
    return loss, terms | {"loss": loss}
