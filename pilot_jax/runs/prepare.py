"""From a config to what a run starts with: data, model, and every client's first state."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from pilot_jax.config import Config
from pilot_jax.data.arrays import pooled
from pilot_jax.data.build import build_clients, partition
from pilot_jax.data.conversations import stop_tokens
from pilot_jax.data.features import bring
from pilot_jax.data.llava.reading import read_samples
from pilot_jax.data.llava.sample import Sample
from pilot_jax.errors import InputError
from pilot_jax.evaluation.metrics import check_metrics
from pilot_jax.federation.cohort import cohort, most_uploads
from pilot_jax.federation.state import ClientState, Federation, State
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.federation.strategies.base import Strategy
from pilot_jax.kernels.attention import check_cudnn
from pilot_jax.models.pretrained import load, load_from_parts, read_shapes
from pilot_jax.parallel.mesh import base_placement, on_training_devices
from pilot_jax.parallel.processes import to_host
from pilot_jax.storage import Store


def load_samples(config: Config) -> list[Sample]:
    """The samples of `data.path`, each with its client."""
    if config.data.path == "digits":
        from pilot_jax.embedded.scenarios import scenario_clients, scene_samples

        d = config.data.digits
        samples = list(scene_samples(scenario_clients(d.scenario, d.train, d.validation, d.test, d.heterogeneity,
                                                      d.clients_per_task), d.seed))
    else:
        samples = read_samples(config.data.path, config.data.image_root, config.data.file_names,
                               config.data.limits)
    return partition(samples, config.data.partition, config.federation.clients, config.data.dirichlet_alpha,
                     config.system.seed)


def _check_names(config: Config, names: list[str], tasks: list[str]) -> None:
    wanted = config.federation.clients
    if config.data.partition == "given" and wanted is not None and wanted != len(names):
        raise InputError(f"federation.clients: {wanted}, but data.path {config.data.path} has {len(names)} clients. "
                         "Drop the key or set data.partition.")
    check_metrics([config.eval.metrics.get(task, "exact") for task in tasks])
    unknown = sorted(set(config.eval.metrics) - set(tasks) - {"grounding"})
    if unknown:
        raise InputError(f"eval.metrics: unknown task {unknown[0]!r}. The data have {', '.join(tasks)}.")
    for round_ in range(1, config.federation.rounds + 1):
        cohort(config, tuple(names), round_)  # refuses unknown names before anything is trained


def prepare(config: Config, strategy: Strategy | None = None) -> tuple[Federation, Any]:
    """Load model and data, check them against the config. Nothing is written."""
    samples = load_samples(config)
    names, tasks = sorted({s.client for s in samples}), sorted({s.task for s in samples})
    _check_names(config, names, tasks)
    if config.system.attention == "cudnn":  # before gigabytes are loaded
        check_cudnn(read_shapes(config.model)[0].text, config.model.dtype)
    lora = config.model.lora
    options: dict[str, Any] = {"dtype": None if config.model.dtype == "auto" else config.model.dtype,
               "lora_scale": lora.alpha / lora.rank, "remat": config.model.remat, "unroll": config.system.unroll,
               "place": base_placement(config.system.mesh)}
    if config.model.parts is None:
        model = load(config.model.path, **options)
    else:
        model = load_from_parts(**config.model.parts.model_dump(), **options)
    tokenizer = model.tokenizer()
    stop_tokens(tokenizer, config.data.template)  # refuses a template the tokenizer cannot end
    model = dataclasses.replace(model, module=model.module.clone(kernel=config.system.attention),
                                base=on_training_devices(model.base, config.system))
    store = None if config.system.store is None else Store(config.system.store)
    clients = build_clients(model, tokenizer, samples, config.data, config.system.length_spread,
                            None if store is None else store.folder)
    strategy = strategy or make_strategy(config.strategy, config.federation.schedule)
    fed = Federation(config, strategy, model, tuple(clients), tuple(tasks), store=store)
    return with_strategy(fed, strategy), tokenizer


def see_everything(fed: Federation) -> None:
    """Every image through the tower, so that one that cannot be read stops nothing that has begun. Of populations on
    disk, and with several processes, they are seen when a client is drawn, and where it is trained."""
    if fed.store is None and jax.process_count() == 1:
        bring([f for c in fed.examined for f in (*(p.features for p in c.evaluation.values()), c.features)], 1)


def with_strategy(fed: Federation, strategy: Strategy, config: Config | None = None) -> Federation:
    """The same data and model under another strategy (and, if given, a config that differs in `strategy`, `train`,
    `federation` or `eval` alone)."""
    clients = fed.examined
    pool = (pooled(list(clients)),) if strategy.pools_data else ()
    fed = dataclasses.replace(fed, strategy=strategy, config=config or fed.config, clients=pool or clients,
                              pool_of=clients if pool else ())
    if fed.config.federation.privacy.clip is None:
        return fed
    fed = dataclasses.replace(fed, most_uploads=most_uploads(fed))
    _ = fed.noise_multiplier  # refuses, before anything is trained, where the accountant is not installed
    return fed


def initial_adapters(fed: Federation) -> dict[str, Any]:
    """What every client starts from; LoRA's A from fold_in(root, "init"), one for all."""
    key = jax.random.fold_in(jax.random.key(fed.config.system.seed), 0x696E6974)  # "init"
    adapters = fed.strategy.initial_adapters(key, to_host(fed.model.base["projector"]), fed.model.config,
                                             fed.config.model.lora.rank, len(fed.tasks))
    fed.strategy.roles().check(adapters)
    return to_host(adapters)


def initial_state(fed: Federation) -> State:
    adapters = initial_adapters(fed)
    roles = fed.strategy.roles()
    server = to_host(fed.strategy.initial_server_state(
        roles.select(adapters, "shared") | roles.select(adapters, "received"),
        np.asarray([c.size for c in fed.clients]), np.asarray([fed.task_index(i) for i in range(len(fed.clients))])))
    return State(tuple(ClientState(adapters) for _ in fed.clients), server)
