"""A run from its directory, and what its models answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pilot_jax.config import Config, EvalConfig, load_config
from pilot_jax.data.build import build_prompts, encode_prompts
from pilot_jax.data.features import image_features
from pilot_jax.data.llava.sample import Sample
from pilot_jax.errors import InputError
from pilot_jax.evaluation.answers import answers, make_decoder
from pilot_jax.evaluation.personalised import Evaluation, examinee
from pilot_jax.federation.state import AnyState, Federation, Population
from pilot_jax.federation.strategies import Strategy, use
from pilot_jax.runs.checkpoint import load_population
from pilot_jax.runs.prepare import Setup, initial_adapters, initial_state, prepare_restored, strategy_name
from pilot_jax.runs.resume import Snapshots
from pilot_jax.storage import read_json


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished (or restored) run."""

    setup: Setup
    population: Population
    summary: dict[str, Any]
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # the lines of metrics.jsonl

    @property
    def config(self) -> Config:
        return self.setup.config

    @property
    def federation(self) -> Federation:
        return self.setup.federation

    @property
    def evaluation(self) -> Evaluation:
        return self.setup.evaluation

    @property
    def tokenizer(self) -> Any:
        return self.setup.tokenizer

    def client(self, name: str) -> int:
        """Index of a client by name.

        Raises:
            InputError: there is none of this name.
        """
        names = [c.name for c in self.evaluation.clients]
        if name not in names:
            raise InputError(f"client {name!r} is not in this run. Known: {', '.join(names)}.")
        return names.index(name)

    def state(self, name: str) -> AnyState:
        """The state of the model that answers for a client."""
        return self.population[self.evaluation.model_of_client[self.client(name)]]


def restore(folder: str | Path, strategy: str | type[Strategy] | Strategy | None = None) -> Run:
    """A run from its directory, finished or as of its last snapshot, to ask its models: on one device where its mesh is
    not there, and without what only training needs.

    Args:
        strategy: the run's strategy, where it is not of this package: class, object or "module:Class". A folder alone
            has no code imported.

    Raises:
        InputError: not a run directory, damaged, or of a strategy that is not known here.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file() or not (folder / "checkpoints").is_dir():
        raise InputError(f"{folder}: not a run directory (no config.yaml or checkpoints). Give what `run` wrote.")
    name = None if strategy is None else use(strategy)
    config = load_config(folder / "config.yaml")
    if name is not None and strategy_name(config) != name:
        raise InputError(f"--strategy: {name}, but {folder} is a run of {strategy_name(config)}. Name that, or "
                         "nothing.")
    setup = prepare_restored(config)
    fed = setup.federation
    if (folder / "checkpoints" / "population.json").is_file():
        population = load_population(folder / "checkpoints", fed.names, initial_adapters(fed))
    else:
        snapshots = Snapshots(folder / "checkpoints" / "resume", fed.names, fed.strategy.roles())
        found = snapshots.load(initial_state(fed), None, lambda text: None, writing=False)
        if found is None:
            raise InputError(f"{folder}: the run has not saved anything yet. Go on with it: run … --resume.")
        population = found[0].population
    summary_file = folder / "summary.json"
    summary = read_json(summary_file, "") if summary_file.is_file() else {}
    return Run(setup, population, summary)


def answer(run: Run, client: str, image: Path | None, prompt: str, settings: EvalConfig | None = None,
           seed: int = 0) -> str:
    """What `client`'s personalised model says to a prompt, about an image if one is given."""
    fed, index, data = run.federation, run.client(client), run.evaluation.data
    one = run.evaluation.clients[index]
    turns = (("human", prompt if image is None else f"<image>\n{prompt}"), ("gpt", ""))
    sample = Sample("prompt", image, turns, one.task, one.name, "test", "--prompt" if image is None else str(image))
    prompts = build_prompts([sample], encode_prompts(fed.model, run.tokenizer, [sample], data),
                            image_features(fed.model, [sample], data))
    settings = (settings or run.setup.eval).model_copy(update={"batch_size": 1})
    decoder = make_decoder(run.tokenizer, data.template, settings, seed)
    model = run.evaluation.model_of_client[index]
    return answers(fed.model, decoder, [examinee(fed, model, run.state(client), prompts, one.task)], 1)[0][0]
