"""A run from its directory, and what its models answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax

from pilot_jax.config import Config, EvalConfig, apply_overrides
from pilot_jax.data.build import build_prompts, encode_prompts
from pilot_jax.data.features import image_features
from pilot_jax.data.llava.sample import Sample
from pilot_jax.errors import InputError
from pilot_jax.evaluation.answers import answers, speaker
from pilot_jax.evaluation.personalised import examinee
from pilot_jax.federation.state import AnyState, Federation, Population
from pilot_jax.parallel.mesh import AXES
from pilot_jax.runs import checkpoint
from pilot_jax.runs.prepare import initial_adapters, initial_state, prepare
from pilot_jax.runs.resume import Snapshots
from pilot_jax.storage import read_json


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished (or restored) run."""

    config: Config
    federation: Federation
    tokenizer: Any
    population: Population
    summary: dict[str, Any]
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def client(self, name: str) -> int:
        """Index of a client by name."""
        names = [c.name for c in self.federation.examined]
        if name not in names:
            raise InputError(f"client {name!r} is not in this run. Known: {', '.join(names)}.")
        return names.index(name)

    def state(self, name: str) -> AnyState:
        """The model that answers for a client."""
        return self.population[self.federation.model_of(self.client(name))]


def restore(folder: str | Path) -> Run:
    """A run from its directory, finished or as of its last snapshot, to ask its models: on one device where its mesh is
    not there, and without what only training needs."""
    from pilot_jax.config import load_config

    folder = Path(folder)
    if not (folder / "config.yaml").is_file() or not (folder / "checkpoints").is_dir():
        raise InputError(f"{folder}: not a run directory (no config.yaml or checkpoints). Give what `run` wrote.")
    config = load_config(folder / "config.yaml", ["system.attention=own"])
    if config.system.mesh.devices > jax.device_count():
        config = apply_overrides(config, [f"system.mesh.{axis}=1" for axis in AXES])
    fed, tokenizer = prepare(config)
    names = [c.name for c in fed.clients]
    if (folder / "checkpoints" / "population.json").is_file():
        population = checkpoint.load_population(folder / "checkpoints", names, initial_adapters(fed))
    else:
        snapshots = Snapshots(folder / "checkpoints" / "resume", names, fed.strategy.roles())
        found = snapshots.load(initial_state(fed), None, lambda text: None, writing=False)
        if found is None:
            raise InputError(f"{folder}: the run has not saved anything yet. Go on with it: run … --resume.")
        population = found[0].population
    summary_file = folder / "summary.json"
    summary = read_json(summary_file, "") if summary_file.is_file() else {}
    return Run(config, fed, tokenizer, population, summary)


def answer(run: Run, client: str, image: Path | None, prompt: str, settings: EvalConfig | None = None,
           seed: int = 0) -> str:
    """What `client`'s personalised model says to a prompt, about an image if one is given."""
    fed, index, data = run.federation, run.client(client), run.config.data
    one = fed.examined[index]
    turns = (("human", prompt if image is None else f"<image>\n{prompt}"), ("gpt", ""))
    sample = Sample("prompt", image, turns, one.task, one.name, "test", "--prompt" if image is None else str(image))
    prompts = build_prompts([sample], encode_prompts(fed.model, run.tokenizer, [sample], data),
                            image_features(fed.model, [sample], data))
    settings = (settings or run.config.eval).model_copy(update={"batch_size": 1})
    voice = speaker(run.tokenizer, data.template, settings, seed)
    asked = examinee(fed, fed.model_of(index), run.state(client), prompts, one.task)
    return answers(fed.model, voice, [asked], 1)[0][0]
