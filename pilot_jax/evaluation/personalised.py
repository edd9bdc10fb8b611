"""Who is asked what: a client's personalised model on its own data, on everybody's, and on what the base could do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pilot_jax.data.arrays import Prompts
from pilot_jax.data.build import build_prompts, encode_prompts
from pilot_jax.data.features import FeatureRows, image_features
from pilot_jax.errors import InputError
from pilot_jax.evaluation.answers import Examinee, base_examinee, scores, speaker
from pilot_jax.federation.roles import Roles
from pilot_jax.federation.state import AnyState, ClientState, Federation, Population

AT_ONCE = 128  # models in memory


def used_adapters(fed: Federation, state: AnyState) -> dict[str, Any]:
    """The subtrees that a client's model reads: those of the last stage it was trained in."""
    roles: Roles = fed.strategy.roles()
    used = roles.names(stage=state.stage, mode="trained") + roles.names(stage=state.stage, mode="frozen")
    adapters = state.adapters
    return {n: adapters[n] for n in used}


def examinee(fed: Federation, index: int, state: AnyState, prompts: Prompts, task: str) -> Examinee:
    """The personalised model of trained client `index` (what it last downloaded plus its local-only state), and what
    it is asked; `task` decides how it is scored."""
    if state.stage == "none":
        return base_examinee(fed.model, task, prompts)
    return Examinee(used_adapters(fed, state), state.stage, fed.task_index(index), task, prompts)


def evaluate(fed: Federation, tokenizer: Any, population: Population | None, split: str = "test") -> dict[str, float]:
    """Score of each client that has `split` samples; `population` None: of the untouched base model."""
    return evaluate_together([fed], tokenizer, [population], split)[0]


def evaluate_together(feds: Sequence[Federation], tokenizer: Any, populations: Sequence[Population | None],
                      split: str = "test") -> list[dict[str, float]]:
    """`evaluate` of several federations with one base, their models decoded side by side."""
    who = [(number, i) for number, fed in enumerate(feds) for i, c in enumerate(fed.examined) if split in c.evaluation]
    out: list[dict[str, float]] = [{} for _ in feds]
    for start in range(0, len(who), AT_ONCE):  # adapters and prompts may come from disk
        block = who[start:start + AT_ONCE]
        asked = []
        for number, i in block:
            fed, population = feds[number], populations[number]
            model, client = fed.model_of(i), fed.examined[i]
            state = population[model] if population is not None else ClientState({})
            asked.append(examinee(fed, model, state, client.evaluation[split], client.task))
        for (number, i), value in zip(block, _scores(feds[0], tokenizer, asked), strict=True):
            out[number][feds[number].examined[i].name] = value
    return out


def _scores(fed: Federation, tokenizer: Any, asked: list[Examinee]) -> list[float]:
    rows = 1 if fed.mesh is None else fed.mesh.shape["clients"]
    width = rows * min(fed.config.system.client_chunk, -(-len(fed.examined) // rows))
    voice = speaker(tokenizer, fed.config.data.template, fed.config.eval, fed.config.system.seed)
    return scores(fed.model, voice, asked, fed.config.eval.metrics, width)


def mean_score(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


def score_by_task(fed: Federation, by_client: dict[str, float]) -> dict[str, float | None]:
    return {t: mean_score([by_client[c.name] for c in fed.examined if c.task == t and c.name in by_client])
            for t in fed.tasks}


def first_prompts(prompts: Prompts, count: int | None) -> Prompts:
    if count is None:
        return prompts
    features = prompts.features
    return Prompts(prompts.input_ids[:count], prompts.attention_mask[:count],
                   features.first(count) if isinstance(features, FeatureRows) else features[:count],
                   prompts.references[:count])


def score_matrix(fed: Federation, tokenizer: Any, population: Population, split: str = "test",
                 count: int | None = None) -> np.ndarray:
    """Scores [K, K]: row k's model on column j's `split` (its first `count` samples), by j's task's metric.

    Raises:
        InputError: a client has no such samples.
    """
    missing = [c.name for c in fed.examined if split not in c.evaluation]
    if missing:
        raise InputError(f"data.path: client {missing[0]!r} has no {split} samples.")
    asked = []
    for i in range(len(fed.examined)):
        model = fed.model_of(i)
        asked += [examinee(fed, model, population[model], first_prompts(c.evaluation[split], count), c.task)
                  for c in fed.examined]
    return np.asarray(_scores(fed, tokenizer, asked)).reshape(len(fed.examined), -1)


def base_prompts(fed: Federation, tokenizer: Any, count: int) -> Prompts:
    """What the embedded base was taught, brief captions, on handwriting of the test pool."""
    from pilot_jax.embedded.scenarios import pretraining_samples

    samples = pretraining_samples(count, fed.config.data.digits.seed)
    encoded = encode_prompts(fed.model, tokenizer, samples, fed.config.data)
    return build_prompts(samples, encoded, image_features(fed.model, samples, fed.config.data))


def forgetting(feds: Sequence[Federation], tokenizer: Any, populations: Sequence[Population | None],
               prompts: Sequence[Prompts]) -> list[list[float]]:
    """Exact match of every client's model on `base_prompts`, by federation; `population` None: of the base, once."""
    asked, counts = [], []
    for fed, population, own in zip(feds, populations, prompts, strict=True):
        states = [ClientState({})] if population is None else list(population)
        asked += [examinee(fed, i, state, own, "base") for i, state in enumerate(states)]
        counts.append(len(states))
    values = _scores(feds[0], tokenizer, asked)
    return [values[sum(counts[:i]):sum(counts[:i + 1])] for i in range(len(counts))]


def evaluation_matrix(fed: Federation, tokenizer: Any, population: Population, split: str = "test",
                      count: int | None = None) -> dict[str, Any]:
    """`score_matrix`, its means by task, and, with the embedded base, what of the base's captioning is left."""
    scores_ = score_matrix(fed, tokenizer, population, split, count)
    columns = {t: [i for i, c in enumerate(fed.examined) if c.task == t] for t in fed.tasks}
    names, captions = [c.name for c in fed.examined], None
    if fed.config.model.path == "embedded" and fed.config.model.parts is None:
        asked = base_prompts(fed, tokenizer, count or 48)
        own, base = forgetting([fed, fed], tokenizer, [population, None], [asked, asked])
        captions = {"base": base[0], "clients": [own[fed.model_of(i)] for i in range(len(names))]}
    return {"split": split, "clients": names, "tasks": list(fed.tasks), "scores": scores_.tolist(),
            "by_task": {name: {t: float(row[of].mean()) for t, of in columns.items()}
                        for name, row in zip(names, scores_, strict=True)}, "base_captions": captions}
