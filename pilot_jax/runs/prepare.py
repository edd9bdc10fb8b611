"""Prepares a run from its config: data, model, federation, and the first state of every client.

This is the only file that reads a whole config. All others are given the sections, or the values, that they need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from pilot_jax.cache import open_cache, remember_in
from pilot_jax.config import (
    Config,
    EvalConfig,
    FederationConfig,
    ModelConfig,
    SystemConfig,
    apply_overrides,
    client_ranks,
    scaled_rates,
)
from pilot_jax.data.arrays import pooled
from pilot_jax.data.build import build_clients, clients_with_answers, refuse_images
from pilot_jax.data.check import Report, Settings, check_data
from pilot_jax.data.conversations import stop_tokens
from pilot_jax.data.division import check_client_count, divided
from pilot_jax.data.given import PREFIX, Data, samples_sha256
from pilot_jax.data.images import check_image_fit
from pilot_jax.data.llava.sample import Sample
from pilot_jax.data.roster import Roster
from pilot_jax.data.tokenizer import LateTokenizer
from pilot_jax.errors import InputError
from pilot_jax.evaluation.answers import make_decoder
from pilot_jax.evaluation.metrics import check_metrics
from pilot_jax.evaluation.personalised import Evaluation
from pilot_jax.evaluation.teacher_forced import check_scoring
from pilot_jax.federation.chunks import chunk_width
from pilot_jax.federation.cohort import participants
from pilot_jax.federation.executor import Executor
from pilot_jax.federation.randomness import key_data
from pilot_jax.federation.roles import Tree
from pilot_jax.federation.state import Federation, State, initial_population, most_uploads
from pilot_jax.federation.strategies import Strategy, make_strategy, use
from pilot_jax.models.packaged import PACKAGED
from pilot_jax.models.pretrained import PretrainedModel, read_shapes
from pilot_jax.models.projectors import check_projector, with_projector
from pilot_jax.parallel.devices import ask_for_determinism, overlap_collectives, split_cpu, use_compilation_cache
from pilot_jax.parallel.mesh import AXES, mesh_of
from pilot_jax.parallel.processes import to_host
from pilot_jax.programs import keep_in
from pilot_jax.runs.base_model import base_model
from pilot_jax.runs.outline import Outline
from pilot_jax.runs.sources import num_tasks, source_samples
from pilot_jax.runs.trackers import check_installed
from pilot_jax.storage import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Bytes in `system.cache`. The least recently used of each kind are removed.
PROGRAMS_KEPT, FEATURES_KEPT, PREPARED_KEPT = 2**30, 2**33, 2**32


@dataclasses.dataclass(frozen=True)
class Setup:
    """All parts of a run before its first round."""

    config: Config  # others pass it on; only this file reads it
    federation: Federation
    evaluation: Evaluation
    executor: Executor
    model: ModelConfig
    eval: EvalConfig
    system: SystemConfig

    @property
    def tokenizer(self) -> Any:
        return self.evaluation.decoder.tokenizer


def with_own_strategy(config: Config, strategy: Strategy) -> tuple[Config, Strategy]:
    """Returns the config with the object's class as its strategy, and the object with the config's schedule."""
    use(strategy)
    strategy = dataclasses.replace(strategy, schedule=config.federation.schedule)
    return config.model_copy(update={"strategy": strategy.params}), strategy


def strategy_name(config: Config) -> str:
    """Returns the name of the config's strategy."""
    return config.strategy.name


def configure(config: Config) -> None:
    """Sets the JAX options of a config, which must happen before JAX starts, and checks that libraries are installed.

    Raises:
        InputError: see `parallel.devices.ask_for_determinism` and `runs.trackers.check_installed`.
    """
    use_compilation_cache(config.system.compilation_cache)
    keep_in(open_cache(config.system.cache, "programs", PROGRAMS_KEPT))
    remember_in(open_cache(config.system.cache, "prepared", PREPARED_KEPT))
    ask_for_determinism(config.system)
    overlap_collectives(config.system)
    check_installed(config.system)


def split_cpu_for(config: Config, processes: int = 1) -> None:
    """Makes JAX divide the CPU into as many devices as a config needs; must be called before JAX starts."""
    split_cpu(config.system, processes)


def prepare_restored(config: Config, data: Data | None = None) -> Setup:
    """Prepares a run whose models shall answer prompts, not train.

    Attention is the package's own, and one device is used if this machine has fewer devices than the run's mesh.

    Raises:
        InputError: see `prepare`; or `data`, given in Python, are not those of the run.
    """
    given, samples = (config, None) if data is None else given_data(config, data)
    if given != config:
        raise InputError("data: these are not the samples of the run. Pass the same data and partition that "
                         "pilot_jax.simulate was given, or leave data= out if the run read data.path.")
    overrides = ["system.attention=own"]
    if config.system.mesh.devices > jax.device_count():
        overrides += [f"system.mesh.{axis}=1" for axis in AXES]
    return prepare(apply_overrides(config, overrides), samples=samples)


def given_data(config: Config, data: Data) -> tuple[Config, list[Sample]]:
    """Returns the samples that a program gave in Python, and the config with their checksum as `data.path`.

    Raises:
        InputError: a sample is wrong.
    """
    samples = data.samples(config.data)
    changed: dict[str, Any] = {"path": PREFIX + samples_sha256(samples)}
    if data.partition is not None:
        changed["partition"] = "given"
    return config.model_copy(update={"data": config.data.model_copy(update=changed)}), samples


def load_samples(config: Config, given: list[Sample] | None = None) -> list[Sample]:
    """Returns the samples of `data.path`, each with the client and the split that it has in the run.

    Args:
        given: the samples that `given_data` has returned, if they were given in Python.

    Raises:
        InputError: the data are wrong, or have an image that the base does not take.
    """
    data = config.data
    samples = source_samples(data, config.system.cache) if given is None else given
    refuse_images(samples, config.model.takes_images)
    return divided(samples, data, config.federation.clients, config.system.seed)


def checked_data(config: Config, path: Path, model: PretrainedModel | None) -> Report:
    """Returns what `check_data` finds in the data of `path` for a run of this config."""
    return check_data(path, config.data, model, Settings(
        config.federation.clients, config.system.seed, config.model.takes_images, config.eval.every))


def _check_names(config: Config, names: list[str], tasks: list[str]) -> None:
    """Checks the config's clients, tasks and metrics against those of the data, before anything is trained."""
    metrics = config.eval.metrics
    check_client_count(config.data, config.federation.clients, len(names))
    check_image_fit(config.data.image_fit)
    check_metrics([metrics.get(task, "exact") for task in tasks])
    check_scoring(config.eval.scoring, metrics, tasks)
    unknown = sorted(set(metrics) - set(tasks) - {"grounding"})
    if unknown:
        raise InputError(f"eval.metrics: unknown task {unknown[0]!r}. The data have {', '.join(tasks)}.")
    if strangers := sorted(set(config.train.clients) - set(names)):
        raise InputError(f"train.clients: unknown client {strangers[0]!r}. Known: {', '.join(names)}.")
    for round_ in range(1, config.federation.rounds + 1):
        participants(config.federation, names, round_, config.system.seed)


def load_model(config: Config) -> PretrainedModel:
    """Returns the base model, on the devices that train."""
    return base_model(config.model, config.system)


def prepare(config: Config, strategy: Strategy | None = None, samples: list[Sample] | None = None,
            roster: Roster | None = None) -> Setup:
    """Loads model and data, and checks them against the config. Nothing is written.

    Args:
        strategy: a strategy object, used instead of the config's strategy.
        samples: the samples that `given_data` has returned, if they were given in Python.
        roster: all clients, if at most one of them has its data here; that of the others is not looked for.

    Raises:
        InputError: config, data or checkpoint are wrong; the message says what.
    """
    if strategy is None:
        strategy = make_strategy(config.strategy, schedule=config.federation.schedule)
    else:
        config, strategy = with_own_strategy(config, strategy)
    strategy = _fitting(config.model, strategy, read_shapes(config.model)[0].text.num_layers)
    samples = [] if roster is not None and roster.own is None else load_samples(config, samples)
    samples = samples if roster is None else roster.mine(samples)
    names, tasks = (sorted({s.client for s in samples}), sorted({s.task for s in samples})) if roster is None else (
        roster.names, roster.tasks)
    _check_names(config, names, tasks)
    ranks = client_ranks(config.model.lora.rank, names)
    model, system = load_model(config), config.system
    tokenizer = cast("PreTrainedTokenizerFast", LateTokenizer(model.text_directory, model.tokenizer))
    stop_tokens(tokenizer, config.data.template)  # raises if the tokenizer lacks the template's stop token
    store = None if system.store is None else Store(system.store)
    kept = open_cache(system.cache, "features", FEATURES_KEPT) if store is None else None
    clients = build_clients(model, tokenizer, samples, config.data, system.length_spread,
                            None if store is None else store.folder, kept,
                            None if roster is None else roster.lengths) if samples else []
    clients = clients if roster is None else roster.completed(clients)
    if config.eval.scoring == "teacher_forced":
        clients = clients_with_answers(model, tokenizer, samples, config.data, clients)
    fed = Federation(strategy, model, tuple(clients), tuple(tasks), config.federation, config.train, system.seed,
                     config.model.lora.largest, ranks, store, spread_uploads=system.mesh.devices > 1)
    evaluation = Evaluation(
        fed, fed.clients, tuple(range(len(clients))),
        make_decoder(tokenizer, config.data.template, config.eval, system.seed), config.eval.metrics,
        chunk_width(system.chunk, len(clients), mesh_of(model.base)), config.data,
        config.model.path in PACKAGED and config.model.parts is None, config.eval.scoring)
    executor = Executor(system.chunk, system.steps_at_once)
    return with_strategy(Setup(config, fed, evaluation, executor, config.model, config.eval, system), strategy)


def with_strategy(setup: Setup, strategy: Strategy, config: Config | None = None) -> Setup:
    """Returns the setup with the same data and model, but another strategy.

    `config`, if given, replaces the setup's. It may differ in `strategy`, `train`, `federation` and `eval` only."""
    config = config or setup.config
    strategy = _fitting(setup.model, strategy, setup.federation.model.config.text.num_layers)
    if (scoring := config.eval.scoring) != setup.eval.scoring:
        raise InputError(f"eval.scoring: {scoring}, but the data are prepared for {setup.eval.scoring}. Give all "
                         "variants the same, in the config or by --set.")
    check_scoring(config.eval.scoring, config.eval.metrics, setup.federation.tasks)
    clients, settings = setup.evaluation.clients, config.federation
    models = tuple(range(len(clients)))
    if strategy.pools_data:
        settings, models = _pooled_settings(settings, len(clients)), (0,) * len(clients)
    fed = dataclasses.replace(
        setup.federation, strategy=strategy, settings=settings, train=config.train, seed=config.system.seed,
        clients=(pooled(list(clients)),) if strategy.pools_data else clients,
        ranks=None if strategy.pools_data else setup.federation.ranks,
        unpooled=clients if strategy.pools_data else ())
    if settings.privacy.clip is not None:
        fed = dataclasses.replace(fed, most_uploads=most_uploads(fed))
        _ = fed.noise_multiplier  # raises before anything is trained if the privacy accountant is not installed
    decoder = make_decoder(setup.tokenizer, config.data.template, config.eval, config.system.seed)
    evaluation = dataclasses.replace(setup.evaluation, fed=fed, model_of_client=models, decoder=decoder,
                                     metrics=config.eval.metrics)
    return dataclasses.replace(setup, config=config, federation=fed, evaluation=evaluation, eval=config.eval)


def _pooled_settings(settings: FederationConfig, clients: int) -> FederationConfig:
    """Returns the settings of one client with the data of all: it joins every round and takes `clients` × the steps."""
    steps = None if settings.local_steps is None else settings.local_steps * clients
    return settings.model_copy(update={"participation": "uniform", "clients_per_round": None, "joins": {},
                                       "dropout": 0.0, "local_steps": steps})


def _fitting(model: ModelConfig, strategy: Strategy, layers: int) -> Strategy:
    """Returns the strategy as it runs on the base and with the LoRA ranks of `model`, which has `layers` of them."""
    differ = isinstance(model.lora.rank, dict) and not strategy.pools_data
    fitting = dataclasses.replace(strategy, ranks_differ=differ, layer_ranks=model.lora.ranks_of(layers))
    fitting = fitting.for_base(model.takes_images)
    check_projector(model.projector, fitting.name, fitting.visual_adapters())
    return fitting


def initial_adapters(fed: Federation) -> dict[str, Tree]:
    """Returns the adapters that every client starts with; all clients have the same random LoRA matrix A.

    Their LoRA has the largest rank. `state.initial_population` has those of clients whose ranks differ.
    """
    key = jax.random.wrap_key_data(jnp.asarray(key_data(fed.seed, 0x696E6974)))  # "init"
    projector = to_host(fed.model.base.get("projector", {}))
    adapters = fed.strategy.initial_adapters(key, projector, fed.model.config, fed.rank, len(fed.tasks))
    adapters = fed.strategy.with_options(adapters, fed.rank)
    fed.strategy.ownership().check(adapters)
    return to_host(adapters)


def initial_state(fed: Federation) -> State:
    """Returns the state of a federation before its first round."""
    adapters, everyone = initial_adapters(fed), range(len(fed.clients))
    roles = fed.strategy.ownership()
    server = to_host(fed.strategy.initial_server_state(
        roles.select(adapters, "shared") | roles.select(adapters, "received"),
        np.asarray([fed.weight(i) for i in everyone]), np.asarray([fed.task_index(i) for i in everyone])))
    return State(initial_population(fed, adapters), server)


def deployed_stages(config: Config) -> tuple[str, ...]:
    """Returns the stages of a config's strategy; an `InputError` if it cannot run on a real network."""
    strategy = make_strategy(config.strategy, schedule=config.federation.schedule)
    if strategy.pools_data or strategy.finetunes or config.federation.finetune_steps is not None:
        raise InputError(f"strategy.name: {strategy.name} cannot be deployed with pooled data or fine-tuning after the "
                         "last round. Set federation.finetune_steps to null, or choose another strategy.")
    return tuple(dict.fromkeys((*strategy.first_stages, *strategy.later_stages)))


def outline(config: Config) -> Outline:
    """Returns the outline of a run. Nothing is allocated and no weights are read.

    Raises:
        InputError: there is no config.json at model.path.
    """
    spec, text_directory = read_shapes(config.model)
    strategy = _fitting(config.model, make_strategy(config.strategy, schedule=config.federation.schedule),
                        spec.text.num_layers)
    spec = with_projector(spec.with_lora_on(config.model.lora.targets), config.model.projector)
    return Outline(spec, text_directory, strategy, config.model, config.data,
                   config.federation, config.train, config.eval, config.system)


def leaves_choices(config: Config) -> bool:
    """Whether a key of the config is auto that `planning.choices.chosen` sets."""
    return "auto" in (config.model.remat, config.system.client_chunk, config.system.attention)


def count_tasks(config: Config) -> int:
    """Returns the number of tasks in the data; images are not read."""
    return num_tasks(config.data)


def seeded(config: Config, seed: int) -> Config:
    """Returns the config with `seed` added to its seeds (initialisation, cohorts, batches; and generated data)."""
    seeds = {"system": config.system.seed, "data.digits": config.data.digits.seed, "data.emoji": config.data.emoji.seed}
    return apply_overrides(config, [f"{section}.seed={value + seed}" for section, value in seeds.items()])


def rate_changes(config: Config, factor: float) -> list[str]:
    """Returns overrides that multiply the config's learning rates, those of single clients too, by `factor`."""
    return scaled_rates(config.train, factor)


def with_overrides(setup: Setup, overrides: Sequence[str]) -> Setup:
    """Returns the setup with the same data and model, but other `strategy`, `train`, `federation` or `eval` keys."""
    config = apply_overrides(setup.config, list(overrides))
    return with_strategy(setup, make_strategy(config.strategy, schedule=config.federation.schedule), config)
