"""Prints what a linear probe can read from each layer of a real base's vision tower: kinds, families and colours.

usage: python benchmarks/tower_probe.py BASE

The probe is a softmax regression on the mean and the maximum of a layer's patch features. It is fitted to the pictures
of the pool `base` and their mirror images, and scored on the pictures of the pool `test`, things that it has not seen.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageOps

from pilot_jax.data.images import pixel_values
from pilot_jax.models.pretrained import PretrainedModel, load
from pilot_jax.real.emoji import Picture, pictures
from pilot_jax.real.emoji_tasks import family_of

BATCH, DECAY, STEPS = 32, 3e-3, 400


def pooled_features(model: PretrainedModel, images: list[Image.Image]) -> np.ndarray:
    """Returns the mean and the maximum over the patches of every layer's features, [n, layers, 2·D]."""
    vision = model.config.vision
    layers = tuple(range(1, vision.num_layers + 1))
    spec = dataclasses.replace(model.config, vision=dataclasses.replace(vision, feature_layers=layers))
    module, tower = model.module.clone(config=spec), {"params": {"vision_tower": model.base["vision_tower"]}}

    @jax.jit
    def pooled(pixels: jax.Array) -> jax.Array:
        x = module.apply(tower, pixels.transpose(0, 2, 3, 1), method="features")
        x = x.reshape(*x.shape[:2], len(layers), -1)
        return jnp.concatenate([x.mean(1), x.max(1)], axis=-1)

    out = []
    for first in range(0, len(images), BATCH):
        part = (images[first:first + BATCH] + images[-1:] * BATCH)[:BATCH]
        out.append(np.asarray(pooled(jnp.asarray(pixel_values(model, part)))))
    return np.concatenate(out)[:len(images)]


def probe_score(train: np.ndarray, classes: np.ndarray, test: np.ndarray, right: list[set[int]]) -> float:
    """Returns the share of test rows whose predicted class is right, by a softmax regression on the training rows."""
    mean, scale = train.mean(0), train.std(0) + 1e-6
    x = jnp.asarray(np.pad((train - mean) / scale, ((0, 0), (0, 1)), constant_values=1.0), jnp.float32)
    optimizer = optax.adam(0.01)

    def loss(weights: jax.Array) -> jax.Array:
        ce = optax.softmax_cross_entropy_with_integer_labels(x @ weights, classes).mean()
        return ce + DECAY * (weights**2).sum()

    @jax.jit
    def fit(weights: jax.Array) -> jax.Array:
        def step(carry: tuple[jax.Array, optax.OptState], _: None) -> tuple[tuple[jax.Array, optax.OptState], None]:
            updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
            return (carry[0] + updates, state), None

        return jax.lax.scan(step, (weights, optimizer.init(weights)), None, length=STEPS)[0][0]

    weights = np.asarray(fit(jnp.zeros((x.shape[1], int(classes.max()) + 1))))
    found = (np.pad((test - mean) / scale, ((0, 0), (0, 1)), constant_values=1.0) @ weights).argmax(1)
    return float(np.mean([one in good for one, good in zip(found, right, strict=True)]))


def _families(picture: Picture) -> tuple[str, ...]:
    """Returns the families of a picture's kinds, each by the name of its first kind."""
    return tuple(dict.fromkeys(family[0] for family in map(family_of, picture.concept.kinds) if family))


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints what a linear probe reads from each layer of a base's tower.")
    parser.add_argument("base", help="folder that `pilot-jax base` wrote")
    model = load(parser.parse_args().base, dtype="float32")
    train, test = list(pictures("base")), list(pictures("test"))
    seen = pooled_features(model, [p.image for p in train] + [ImageOps.mirror(p.image) for p in train])
    unseen = pooled_features(model, [p.image for p in test])
    asked: dict[str, Callable[[Picture], tuple[str, ...]]] = {
        "kind": lambda p: p.concept.kinds, "family": _families, "colour": lambda p: p.colours}
    side = model.config.vision.image_size
    print(f"| layer, at {side} pixels | {' | '.join(asked)} |\n|---|{'---:|' * len(asked)}")
    for layer in range(seen.shape[1]):
        cells = []
        for answers in asked.values():
            names = sorted({answers(p)[0] for p in train if answers(p)})
            rows = [i for i, p in enumerate(train) if answers(p)]
            classes = np.array([names.index(answers(train[i])[0]) for i in rows])
            into = [i for i, p in enumerate(test) if answers(p)]
            right = [{names.index(a) for a in answers(test[i]) if a in names} for i in into]
            both = np.concatenate([seen[rows, layer], seen[[i + len(train) for i in rows], layer]])
            cells.append(f"{probe_score(both, np.tile(classes, 2), unseen[into, layer], right):.3f}")
        print(f"| {layer + 1} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
