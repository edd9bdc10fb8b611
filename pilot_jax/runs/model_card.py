"""The model card of an exported client, as hubs show it: what it was made of, how, on how much, and its scores."""

from __future__ import annotations

from collections.abc import Sequence

from pilot_jax import __version__
from pilot_jax.models.connector import connector_stage
from pilot_jax.runs.restore import Run
from pilot_jax.words import counted, yaml_text


def base_name(run: Run, given: str | None = None) -> str:
    """Returns the name of the run's base model: the `given` one, or its path; of parts, that of the language model."""
    model = run.setup.model
    if given is not None:
        return given
    return model.path if model.parts is None else model.parts.language


def _scores(run: Run, client: str, task: str) -> list[tuple[str, str]]:
    out = []
    for label, key in (("score on the client's test data", "score_by_client"),
                       ("score of the base model on the same data", "score_base_by_client")):
        score = run.summary.get(key, {}).get(client)
        out.append((label, "not evaluated" if score is None else
                    f"{score:.3f} ({run.evaluation.metrics.get(task, 'exact')})"))
    return out


def facts(run: Run, client: str) -> list[tuple[str, object]]:
    """Returns what is known of how a client's model was trained, as (name, value)."""
    setup, summary, state = run.setup, run.summary, run.state(client)
    index, data = run.client(client), run.evaluation.data
    own, trained = run.evaluation.clients[index], run.federation.rank_of(run.evaluation.model_of_client[index])
    staged = bool(run.federation.strategy.visual_adapters())
    sizes = [one.size for one in run.evaluation.clients]
    return [
        ("method", summary.get("strategy", run.federation.strategy.name)),
        ("client", client), ("task", own.task), ("training samples", own.size),
        ("training samples of all clients", f"{sum(sizes)} of {counted(len(sizes), 'client')}"),
        ("rounds taken part in", state.rounds), ("rounds of the run", run.federation.settings.rounds),
        *([("stage of the connector", connector_stage(state.stage))] if staged else []),
        ("LoRA rank, alpha in training", f"{trained}, {setup.model.lora.alpha:g}"),
        ("conversation template", data.template),
        *([("images", "padded to a square with the processor's mean colour before it (data.image_fit: pad)"
            if data.image_fit == "pad" else f"changed by the run's own function `{data.image_fit}` (data.image_fit)")]
          if setup.model.takes_images and data.image_fit != "processor" else []),
        ("seed", setup.system.seed),
        ("adapters_sha256 of the run", summary.get("adapters_sha256", "unknown: the run was not finished")),
        ("written by", f"pilot_jax {__version__}"), *_scores(run, client, own.task)]


def card(run: Run, client: str, text: str, *, library: str, more: Sequence[tuple[str, object]] = (),
         licence: str | None = None, base: str | None = None) -> str:
    """Returns the text of README.md.

    Args:
        text: what the folder holds, in sentences.
        library: the library that loads it, as hubs name it.
        more: further facts.
        licence: the licence of the weights; None: unknown.
        base: the base model's name on the hub; None: the path that the run read, which hubs refuse as a name.
    """
    images = run.setup.model.takes_images
    front = {"library_name": library, **({} if base is None else {"base_model": base}), "license": licence or "unknown",
             "pipeline_tag": "image-text-to-text" if images else "text-generation",
             "tags": ["lora", *(["llava"] if images else []), "federated"]}
    head = "\n".join(f"{key}: {yaml_text(value)}" for key, value in front.items())
    rows = [("base model", base_name(run, base)), *facts(run, client), *more,
            ("licence", licence or "unknown: that of the base model and of the data apply")]
    table = "\n".join(f"| {name} | {str(value).replace('|', ' ')} |" for name, value in rows)
    return f"---\n{head}\n---\n\n# {client}\n\n{text}\n\n| | |\n|---|---|\n{table}\n"
