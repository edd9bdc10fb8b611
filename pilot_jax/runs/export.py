"""Exports one client's adapters from a run, with a model card that says how they were trained."""

from __future__ import annotations

import json
from pathlib import Path

from pilot_jax import __version__
from pilot_jax.errors import InputError
from pilot_jax.evaluation.personalised import used_adapters
from pilot_jax.models.checkpoints.peft import check_is_one_lora, lora_rank, peft_lora, save_adapters
from pilot_jax.models.connector import connector_stage
from pilot_jax.models.lora import RESIDUAL, assembled
from pilot_jax.runs.restore import Run


def _model_card(run: Run, client: str, base: str, rank: int, lost: float) -> str:
    setup, summary, has_connector = run.setup, run.summary, bool(run.federation.strategy.visual_adapters())
    index, state = run.client(client), run.state(client)
    own, trained = run.evaluation.clients[index], run.federation.rank_of(run.evaluation.model_of_client[index])
    rows = [
        ("base model", base), ("method", summary.get("strategy", run.federation.strategy.name)), ("client", client),
        ("task", own.task), ("training samples", own.size), ("rounds taken part in", state.rounds),
        ("rounds of the run", run.federation.settings.rounds),
        *([("stage of the connector", connector_stage(state.stage))] if has_connector else []),
        ("LoRA rank, alpha in training", f"{trained}, {setup.model.lora.alpha:g}"), ("LoRA rank here", rank),
        *([("part of the change of the weights that this rank loses", f"{lost:.2g}")] if lost > 1e-6 else []),
        ("conversation template", run.evaluation.data.template), ("seed", setup.system.seed),
        ("adapters_sha256 of the run", summary.get("adapters_sha256", "unknown: the run was not finished")),
        ("written by", f"pilot_jax {__version__}")]
    for label, key in (("score on the client's test data", "score_by_client"),
                       ("score of the base model on the same data", "score_base_by_client")):
        score = summary.get(key, {}).get(client)
        rows.append((label, "not evaluated" if score is None else f"{score:.3f} "
                     f"({run.evaluation.metrics.get(own.task, 'exact')})"))
    table = "\n".join(f"| {name} | {str(value).replace('|', ' ')} |" for name, value in rows)
    tags = "lora, llava, federated" if setup.model.takes_images else "lora, federated"
    front = f"---\nlibrary_name: peft\nbase_model: {json.dumps(base)}\ntags: [{tags}]\n---\n"
    connector = ("; `connector.safetensors` takes the place of the vision–language projector (layout and loader: "
                 "`docs/exported-adapters.md` of pilot_jax).") if has_connector else "."
    return (f"{front}\n# {client}\n\nThe personalised adapters of one client of a federated run.\n\n| | |\n|---|---|\n"
            f"{table}\n\n`adapter_model.safetensors` is a PEFT LoRA of the language model{connector}\n")


def export_client(run: Run, client: str, out: Path, rank: int | None = None) -> float:
    """Writes a client's adapters into the new folder `out`.

    rank: largest rank of the LoRA that is written.

    Returns: the part of the change of the weights that this rank loses, ‖ΔW − B·A‖_F / ‖ΔW‖_F.

    Raises:
        InputError: the run has no such client, the client took part in no round, its model is not one LoRA, or the
            folder exists already.
    """
    index, state, fed, model = run.client(client), run.state(client), run.federation, run.setup.model
    if out.exists():
        raise InputError(f"--out: {out} exists already. Choose a new folder; nothing was written.")
    if state.stage == "none":
        raise InputError(f"--client: {client} took part in no round, so it has no adapters of its own.")
    stage = connector_stage(state.stage)
    kind, base = ("llava", model.path) if model.parts is None else ("language_model", model.parts.language)
    number, adapters = run.evaluation.model_of_client[index], used_adapters(fed, state)
    check_is_one_lora(assembled(adapters) or {"layers": {}}, fed.strategy.name)
    lora, lost = peft_lora(adapters, fed.rank, rank)
    own_rank = fed.rank if RESIDUAL in adapters else fed.rank_of(number)
    save_adapters(out, adapters, lora, stage=stage, tasks=fed.tasks, task_index=fed.task_index(number),
                  alpha_over_rank=model.lora.alpha / own_rank, kind=kind, base=base,
                  card=_model_card(run, client, base, lora_rank(lora), lost))
    return lost
