"""Decodes the answers of several clients' models to their prompts at once, in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pilot_jax.config import EvalConfig
from pilot_jax.data.arrays import Prompts
from pilot_jax.data.conversations import stop_tokens
from pilot_jax.data.features import compute_features
from pilot_jax.models.generate import Decoding, generate
from pilot_jax.models.pretrained import PretrainedModel, plain_connector
from pilot_jax.parallel.mesh import mesh_of
from pilot_jax.parallel.processes import is_on_this_process, over_clients, to_host

Rows = Mapping[str, Any]
Program = Callable[[str, Any, dict[str, jax.Array], jax.Array, np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Examinee:
    """One client's model and the prompts that it must answer."""

    adapters: dict[str, Any]  # only the subtrees that the model reads in `stage`
    stage: str  # plain | stage1 | stage2
    task_index: int
    task: str
    prompts: Prompts


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The tokenizer and the settings with which answers are decoded."""

    tokenizer: Any
    how: Decoding
    batch_size: int
    seed: int = 0

    def text(self, tokens: np.ndarray) -> str:
        """Returns the tokens before the first stop token as text."""
        ends = np.flatnonzero(np.isin(tokens, self.how.stop_ids))
        tokens = tokens[:ends[0]] if len(ends) else tokens
        return self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True).strip()


def make_decoder(tokenizer: Any, template: str, config: EvalConfig, seed: int = 0) -> Decoder:
    """Returns a decoder with the settings of the section `eval`; answers end at the stop token of `template`."""
    how = Decoding(config.max_new_tokens, stop_tokens(tokenizer, template), config.temperature, config.top_p)
    return Decoder(tokenizer, how, config.batch_size, seed)


def in_batches(model: PretrainedModel, examinees: Sequence[Examinee], rows: Sequence[Rows], program: Program,
               width: int, batch_size: int) -> list[Any]:
    """Returns the results of a program for the rows of every examinee, a tree of arrays [n, …] for each.

    Args:
        rows: each examinee's n rows, arrays [n, …] by name, among them features. Arrays of a name differ in n alone.
        program: a function of the stage, adapters [width, …], a batch of rows [width, B, …], task_index [width] and the
            rows' numbers, int [B]. It returns a tree of arrays [width, B, …].
        width: number of models that run at once, over the `clients` axis of the base model's mesh.
        batch_size: the largest B.
    """
    out: list[Any] = [None] * len(examinees)
    kinds = [(e.stage, *sorted(e.adapters)) for e in examinees]  # "plain" is FedAvg's stage and also the base model's
    for kind in sorted(set(kinds)):
        indices = [i for i, own in enumerate(kinds) if own == kind]
        compute_features([rows[i]["features"] for i in indices], width)
        for first in range(0, len(indices), width):
            members = indices[first:first + width]
            found = _side_by_side(model, [examinees[i] for i in members], [rows[i] for i in members], program, width,
                                  batch_size)
            for i, own in zip(members, found, strict=True):
                out[i] = own
    return out


def _side_by_side(model: PretrainedModel, members: list[Examinee], rows: list[Rows], program: Program, width: int,
                  batch_size: int) -> list[Any]:
    """Returns the results of at most `width` examinees of the same stage.

    They are padded to `width` by repeating one of them, and a model's last row is repeated likewise."""
    mesh = mesh_of(model.base)
    on_this_process = is_on_this_process(mesh, width)  # only these rows are read
    padded = members + members[:1] * (width - len(members))
    adapters = over_clients(jax.tree.map(lambda *leaves: np.stack([np.asarray(x) for x in leaves]),
                                         *[e.adapters for e in padded]), mesh)
    tasks = over_clients(np.asarray([e.task_index for e in padded], np.int32), mesh)
    counts, parts = [len(own["input_ids"]) for own in rows], list[Any]()
    at_once = min(batch_size, max(counts))
    for first in range(0, max(counts), at_once):
        take = np.arange(first, first + at_once)
        batch = over_clients({name: _batch(name, rows, on_this_process, take) for name in rows[0]}, mesh)
        parts.append(to_host(program(members[0].stage, adapters, batch, tasks, take)))
    whole = jax.tree.map(lambda *arrays: np.concatenate(arrays, axis=1), *parts)
    return [jax.tree.map(lambda array, k=k, n=n: array[k, :n], whole) for k, n in enumerate(counts)]


def _batch(name: str, rows: list[Rows], on_this_process: list[bool], take: np.ndarray) -> np.ndarray:
    """Returns the array `name` of the rows with the numbers `take` of every model, [width, len(take), …].

    The last row of a model with fewer rows is repeated. Rows of models that are not on this process's devices, or that
    only fill up the width, are zeros.
    """
    first = rows[0][name]
    out = np.zeros((len(on_this_process), len(take), *first.shape[1:]), first.dtype)
    if name == "attention_mask":
        out[len(rows):, :, 0] = 1  # so that rows that only fill up the width have finite results
    for k, own in enumerate(rows):
        if on_this_process[k]:
            out[k] = own[name][np.minimum(take, len(own[name]) - 1)]
    return out


def answers(model: PretrainedModel, decoder: Decoder, examinees: Sequence[Examinee], width: int) -> list[list[str]]:
    """Returns every examinee's answers to its prompts, in order.

    Args:
        width: number of models that are decoded at once, over the `clients` axis of the base model's mesh.
    """
    def program(stage: str, adapters: Any, batch: dict[str, jax.Array], tasks: jax.Array, take: np.ndarray) -> Any:
        # The random key depends on the prompt's index only, not on the models that are decoded at the same time.
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(decoder.seed)))(take)
        prompts = batch | {"keys": jnp.broadcast_to(keys, (width, len(take)))}
        return generate(model.module, model.base, adapters, prompts, tasks, stage=stage, how=decoder.how)

    rows = [{name: getattr(e.prompts, name) for name in ("input_ids", "attention_mask", "features")} for e in examinees]
    tokens = in_batches(model, examinees, rows, program, width, decoder.batch_size)
    return [[decoder.text(row) for row in own] for own in tokens]


def base_examinee(model: PretrainedModel, task: str, prompts: Prompts) -> Examinee:
    """Returns the base model without training, with prompts to answer."""
    return Examinee(plain_connector(model.base), "plain", 0, task, prompts)
