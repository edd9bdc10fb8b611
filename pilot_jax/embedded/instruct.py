"""Trains the instructed base: the embedded base, taught four tasks in the base's own wordings.

A federation that starts from it need not teach its clients to obey: what is left to learn are looks and wordings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pilot_jax.embedded.pretrain import LanguageConfig, Lessons, image_processor, train_language
from pilot_jax.embedded.scenarios import SCENARIOS
from pilot_jax.embedded.scenes import Scene
from pilot_jax.embedded.tasks import BASE_WORDINGS, TASKS, pretraining_caption
from pilot_jax.errors import InputError
from pilot_jax.files import new_folder, read_json
from pilot_jax.models.checkpoints.writing import save_base
from pilot_jax.models.pretrained import load

INSTRUCTED_TASKS = SCENARIOS["c"][0]


@dataclasses.dataclass(frozen=True)
class InstructConfig(LanguageConfig):
    """Training settings of the instructed base; `configs/pretrain_instructed.yaml` has them."""

    lr: float = 1e-3
    start: str = "embedded"  # base with which training starts, as `model.path`
    captions: float = 0.2  # share of the lessons that are captions, as in pretraining


def instruction(rng: np.random.Generator, scene: Scene, captions: float = 0.0) -> tuple[str, str]:
    """Returns a question of a random task in a random wording of the base's, and its answer.

    Args:
        captions: probability of an instruction of the pretraining instead.
    """
    if rng.random() < captions:
        return pretraining_caption(rng, scene)
    task = INSTRUCTED_TASKS[int(rng.integers(len(INSTRUCTED_TASKS)))]
    return TASKS[task](rng, scene, int(rng.choice(BASE_WORDINGS)))


def instruct(out: str | Path, config: InstructConfig | None = None, report: Callable[[str], None] = print) -> Path:
    """Trains the instructed base and writes it to `out`, a new Hugging Face LLaVA directory.

    Args:
        report: a function that is called with a line of text every 100 steps.

    Raises:
        InputError: `out` exists, or `start` is not a base.
    """
    config, out = config or InstructConfig(), Path(out)
    if out.exists():
        raise InputError(f"{out}: exists already. Choose a new folder; nothing was written.")
    model = load(config.start, dtype="float32")
    tokenizer, tower = model.tokenizer(), model.base["vision_tower"]
    lessons = Lessons(lambda rng, scene: instruction(rng, scene, config.captions), tokenizer,
                      model.config.num_image_tokens)
    start = {name: model.base[name] for name in ("projector", "decoder")}
    trained = train_language(model.module, tower, start, lessons, config, report)
    raw = read_json(model.text_directory / "config.json",
                    "start must be `embedded` or a directory that `pilot-jax pretrain` wrote.")
    with new_folder(out) as folder:
        save_base(folder, model.config, {"vision_tower": tower} | trained, raw)
        tokenizer.save_pretrained(folder)
        image_processor().save_pretrained(folder)
    return out
