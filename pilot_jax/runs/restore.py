"""Loads a run from its directory, and lets its models answer prompts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pilot_jax.config import Config, EvalConfig
from pilot_jax.data.build import build_prompts, encode_prompts
from pilot_jax.data.features import image_features
from pilot_jax.data.given import as_data
from pilot_jax.data.tokenizer import LateTokenizer
from pilot_jax.errors import InputError
from pilot_jax.evaluation.answers import answers, make_decoder
from pilot_jax.evaluation.personalised import Evaluation, examinee
from pilot_jax.evaluation.questions import Picture, question_sample
from pilot_jax.federation.state import AnyState, Federation, Population
from pilot_jax.federation.strategies import Strategy, use
from pilot_jax.files import read_json
from pilot_jax.runs.checkpoint import load_population
from pilot_jax.runs.manifest import check_files, has_ended, run_config
from pilot_jax.runs.prepare import Setup, initial_adapters, initial_state, prepare_restored, strategy_name
from pilot_jax.runs.resume import Snapshots


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that has ended or was restored: its setup, the clients' final states, its summary and its records."""

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
        tokenizer = self.setup.tokenizer
        return tokenizer.loaded() if isinstance(tokenizer, LateTokenizer) else tokenizer

    def client(self, name: str) -> int:
        """Returns the index of a client.

        Raises:
            InputError: the run has no client of this name.
        """
        names = [c.name for c in self.evaluation.clients]
        if name not in names:
            raise InputError(f"client {name!r} is not in this run. Known: {', '.join(names)}.")
        return names.index(name)

    def state(self, name: str) -> AnyState:
        """Returns the state of a client's model; all clients of a run on pooled data have one model."""
        return self.population[self.evaluation.model_of_client[self.client(name)]]

    def ask(self, client: str, image: Picture, question: str, *, max_new_tokens: int = 64) -> str:
        """Returns the greedy answer of a client's personalised model to a question about an image, or without one.

        Args:
            image: a file, a picture of Pillow's, or None.
            max_new_tokens: the largest number of tokens of the answer.

        Raises:
            InputError: the run has no such client, or the image cannot be read.
        """
        greedy = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "top_p": 1.0}
        return answer(self, client, image, question, self.setup.eval.model_copy(update=greedy))


def restore(folder: str | Path, strategy: str | type[Strategy] | Strategy | None = None, data: Any = None) -> Run:
    """Loads a run from its directory so that its models can answer prompts; an unfinished run as of its last snapshot.

    One device is used if this machine has fewer devices than the run's mesh.

    Args:
        strategy: the run's strategy, if it is not one of this package: a class, an object or "module:Class". No module
            is imported only because a run's config.yaml names it.
        data: the run's samples, if they were given in Python: the same as were given to `simulate`.

    Raises:
        InputError: the folder is not a run directory, is damaged, or has a strategy that is not known; or `data` are
            missing, or not those of the run.
    """
    folder = Path(folder)
    if not (folder / "config.yaml").is_file() or not (folder / "checkpoints").is_dir():
        raise InputError(f"{folder}: not a run directory (no config.yaml or checkpoints). Give a folder that "
                         "`pilot-jax run` wrote.")
    name = None if strategy is None else use(strategy)
    config, ended = run_config(folder), has_ended(folder)
    check_files(folder, lambda path: path == "summary.json" or path.startswith("checkpoints/"))
    if name is not None and strategy_name(config) != name:
        raise InputError(f"--strategy: {name}, but {folder} is a run of {strategy_name(config)}. Give that strategy, "
                         "or leave the option out.")
    setup = prepare_restored(config, None if data is None else as_data(data))
    fed = setup.federation
    if ended:
        population = load_population(folder / "checkpoints", fed.names, initial_adapters(fed))
    else:
        snapshots = Snapshots(folder / "checkpoints" / "resume", fed.names, fed.strategy.ownership())
        found = snapshots.load(initial_state(fed), None, lambda text: None, writing=False)
        if found is None:
            raise InputError(f"{folder}: the run has not saved anything yet. Continue it with `pilot-jax run … "
                             "--resume`.")
        population = found[0].population
    return Run(setup, population, read_json(folder / "summary.json", "") if ended else {})


def answer(run: Run, client: str, image: Picture, prompt: str, settings: EvalConfig | None = None,
           seed: int = 0) -> str:
    """Returns the answer of `client`'s personalised model to a prompt, and to an image if one is given.

    Args:
        image: a file, a picture of Pillow's, or None.
        settings: how the answer is decoded; None: as in the run's evaluation.
        seed: the seed of the sampling, if `settings` samples.
    """
    fed, index, data = run.federation, run.client(client), run.evaluation.data
    one = run.evaluation.clients[index]
    sample = question_sample(image, prompt, one.task, one.name)
    prompts = build_prompts([sample], encode_prompts(fed.model, run.tokenizer, [sample], data),
                            image_features(fed.model, [sample], data))
    settings = (settings or run.setup.eval).model_copy(update={"batch_size": 1})
    decoder = make_decoder(run.tokenizer, data.template, settings, seed)
    model = run.evaluation.model_of_client[index]
    return answers(fed.model, decoder, [examinee(fed, model, run.state(client), prompts, one.task)], 1)[0][0]
