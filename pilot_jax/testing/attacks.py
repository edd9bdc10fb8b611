"""Clients that attack a federation: what they upload, given everything that all clients have trained in a phase.

The attackers know all uploads of the phase and the server's rules, which is more than a client of a real network knows.
An attack is a function of `Phase` that returns the attackers' uploads; `AttackedExecutor` puts them in the place of
what they have trained. An attacker that only has wrong data needs none: `with_flipped_answers` changes its samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import jax
import numpy as np

from pilot_jax.data.llava.sample import Sample
from pilot_jax.federation.executor import Executor, Work
from pilot_jax.federation.halves import SKETCH
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.roles import Tree
from pilot_jax.federation.state import Trained
from pilot_jax.federation.uploads import judged

Upload = dict[str, Tree]
LORA = "text_adapter"


@dataclasses.dataclass(frozen=True)
class Phase:
    """What attackers know: by client, its upload and the same subtrees at the start of the phase."""

    uploads: Mapping[int, Upload]
    starts: Mapping[int, Upload]
    attackers: tuple[int, ...]
    mixes_updates: bool  # whether the server mixes changes, and not models

    def change(self, client: int, name: str = LORA) -> np.ndarray:
        """Returns a client's change of a subtree as one vector, float64."""
        return vector(self.uploads[client][name]) - vector(self.starts[client][name])


Attack = Callable[[Phase], dict[int, Upload]]


def vector(tree: Tree) -> np.ndarray:
    """Returns all leaves of a tree as one vector, float64."""
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def like(tree: Tree, values: np.ndarray) -> Tree:
    """Returns the inverse of `vector`, with the shapes and dtypes of `tree`."""
    leaves, structure = jax.tree.flatten(tree)
    parts = np.split(values, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(structure, [part.reshape(leaf.shape).astype(leaf.dtype)
                                          for part, leaf in zip(parts, leaves, strict=True)])


def scaled(factor: float) -> Attack:
    """Returns the attack that multiplies what an attacker has learnt by `factor`; −1 is a sign flip.

    Sketches of gradients, which only decide about weights, stay as they are.
    """
    def attack(phase: Phase) -> dict[int, Upload]:
        def times(upload: Upload, start: Upload) -> Upload:
            return {name: tree if name == SKETCH else jax.tree.map(
                lambda x, o: (o + factor * (x - o)).astype(x.dtype), tree, start[name])
                for name, tree in upload.items()}

        return {a: times(phase.uploads[a], phase.starts[a]) for a in phase.attackers}

    return attack


def orthogonal(change: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """Returns the unit vector along the part of `change` that is orthogonal to `others`, themselves orthogonal."""
    for other in others:
        change = change - (change @ other) / (other @ other) * other
    return change / np.linalg.norm(change)


def sybils(victim: int, size: float | None = None, differ: bool = False) -> Attack:
    """Returns the attack of copies of a victim that have the same poison added, orthogonal to the victim's change.

    The poison is what the first attacker has learnt, without its part along the victim's change. It is LoRA that is
    copied and poisoned or, where clients upload sketches of gradients, each subtree that is measured by them, by
    itself. So that the victim is measured to be near, its sketches are copied too. In a phase in which the victim does
    not take part, attackers upload what they have trained.

    Args:
        size: norm of the poison, as a multiple of that of the victim's change. None: the attackers know
            `strategy.clip: 1`, and stay just under its radius, at 0.99 of the honest clients' median.
        differ: half of the poison's squared norm is a second direction, added by every second attacker and subtracted
            by the others, so that they repeat each other less.
    """
    def attack(phase: Phase) -> dict[int, Upload]:
        honest = [c for c in phase.uploads if c not in phase.attackers]
        if victim not in phase.uploads or not phase.attackers:
            return {}
        sketches = phase.uploads[victim].get(SKETCH)
        copied = {} if sketches is None else {SKETCH: sketches}
        out = {a: {**phase.uploads[a], **copied} for a in phase.attackers}
        for name in sketches or (LORA,):
            goal = phase.change(victim, name)
            lengths = sorted(float(np.linalg.norm(phase.change(c, name))) for c in honest)
            norm = 0.99 * lengths[(len(lengths) - 1) // 2] if size is None else size * float(np.linalg.norm(goal))
            poison = orthogonal(phase.change(phase.attackers[0], name), goal)
            aside = orthogonal(phase.change(phase.attackers[-1], name)[::-1], goal, poison)
            for number, a in enumerate(phase.attackers):
                part = (poison + (-1) ** number * aside) / np.sqrt(2) if differ else poison
                origin = phase.starts[a if phase.mixes_updates else victim][name]
                out[a][name] = like(origin, vector(origin) + goal + norm * part)
        return out

    return attack


@dataclasses.dataclass(frozen=True)
class AttackedExecutor(Executor):
    """Trains all clients honestly, and then replaces the uploads of the attackers, which are clients by index."""

    attackers: tuple[int, ...] = ()
    attack: Attack | None = None

    def train(self, works: Sequence[Work], observer: RunObserver | None = None) -> list[Trained]:
        trained = super().train(works, observer)
        return [self._attacked(*pair) for pair in zip(works, trained, strict=True)] if self.attack else trained

    def _attacked(self, work: Work, trained: Trained) -> Trained:
        assert self.attack is not None
        roles, strategy = work.fed.strategy.ownership(), work.fed.strategy
        uploads = {c: roles.upload(adapters, work.stage) for c, adapters in trained.adapters.items()}
        starts = {c: roles.upload(work.adapters[c], work.stage) for c in uploads}
        here = tuple(a for a in self.attackers if a in uploads)
        adapters, records = dict(trained.adapters), dict(trained.records)
        for a, upload in self.attack(Phase(uploads, starts, here, strategy.mixes_updates)).items():
            adapters[a] = {**adapters[a], **upload}
            records[a] = {k: v for k, v in records[a].items() if k not in ("update_norm", "fault")} | judged(
                upload, starts[a])
        return dataclasses.replace(trained, adapters=adapters, records=records)


def with_flipped_answers(samples: Sequence[Sample], clients: Collection[str], seed: int = 0) -> list[Sample]:
    """Returns the samples, with the answers of each of `clients`' training samples given to another of its samples.

    Questions and pictures stay. Of conversations with several turns, the answers go together.
    """
    out = list(samples)
    for name in clients:
        own = [i for i, s in enumerate(samples) if s.client == name and s.split == "train"]
        order = np.random.default_rng([seed, *name.encode()]).permutation(own)
        for i, j in zip(order, np.roll(order, 1), strict=True):
            answers = [text for who, text in samples[j].turns if who == "gpt"]
            turns = tuple((who, answers.pop(0) if who == "gpt" and answers else text) for who, text in samples[i].turns)
            out[i] = dataclasses.replace(samples[i], turns=turns)
    return out
