"""Exports one client's model from a run: its adapters, or a whole checkpoint in which they are merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pilot_jax.data.conversations import stop_tokens
from pilot_jax.errors import InputError
from pilot_jax.evaluation.personalised import used_adapters
from pilot_jax.files import new_folder
from pilot_jax.models.checkpoints import stock
from pilot_jax.models.checkpoints.merging import changes, write_checkpoint
from pilot_jax.models.checkpoints.peft import check_is_one_lora, lora_rank, peft_lora, save_adapters
from pilot_jax.models.connector import connector_stage
from pilot_jax.models.lora import LORA_SUBTREES, RESIDUAL, assembled, joined
from pilot_jax.runs.model_card import base_name, card
from pilot_jax.runs.prompt_form import chat_template, prompt_form
from pilot_jax.runs.restore import Run


def check_is_new(out: Path, option: str) -> None:
    """Raises an `InputError` if the folder of an option exists."""
    if out.exists():
        raise InputError(f"{option}: {out} exists already. Choose a new folder; nothing was written.")


def _adapters(run: Run, client: str, out: Path, option: str) -> dict[str, Any]:
    """Returns the subtrees that a client's model reads, and checks that they can be written.

    Raises:
        InputError: the run has no such client, the client took part in no round, its model is not one LoRA, or the
            folder exists already.
    """
    state = run.state(client)
    check_is_new(out, option)
    if state.stage == "none":
        raise InputError(f"--client: {client} took part in no round, so it has no adapters of its own.")
    if (name := run.setup.model.projector) is not None:
        raise InputError(f"{option}: the run has a projector of your own ({name}), for which PEFT and LLaVA have no "
                         "form. In Python, pilot_jax.restore(RUN).ask(client, image, question) uses it.")
    adapters = used_adapters(run.federation, state)
    check_is_one_lora(assembled(adapters) or {"layers": {}}, run.federation.strategy.name)
    return adapters


def _about(run: Run, client: str, base: str | None) -> dict[str, Any]:
    """Returns the content of `pilot_jax.json`: what a program needs in order to ask an exported client."""
    data, model = run.evaluation.data, run.setup.model
    parts = None if model.parts is None else model.parts.model_dump()
    return {"format": 1, "client": client, "strategy": run.federation.strategy.name, "base": base_name(run, base),
            "parts": parts, "takes_images": model.takes_images, "image_fit": data.image_fit,
            **prompt_form(data.template, run.tokenizer)}


def _storage(run: Run) -> list[tuple[str, str]]:
    """Returns the model card's row about a base that was quantised in training; the checkpoint's weights are not."""
    storage = run.setup.model.base
    return [("storage of the base in training", storage)] if storage in ("int8", "nf4") else []


def export_client(run: Run, client: str, out: str | Path, rank: int | None = None, licence: str | None = None,
                  base: str | None = None) -> float:
    """Writes a client's adapters into the new folder `out`.

    Args:
        rank: largest rank of the LoRA that is written.
        licence: the licence that the model card names; None: unknown.
        base: the base model's name, such as its name on a hub; None: the path that the run read.

    Returns: the part of the change of the weights that this rank loses, ‖ΔW − B·A‖_F / ‖ΔW‖_F.

    Raises:
        InputError: see `_adapters`.
    """
    out = Path(out)
    adapters, state = _adapters(run, client, out, "--out"), run.state(client)
    fed, model = run.federation, run.setup.model
    number = run.evaluation.model_of_client[run.client(client)]
    lora, lost = peft_lora(adapters, fed.rank, rank)
    own_rank = fed.rank if RESIDUAL in adapters else fed.rank_of(number)
    connector = "; `connector.safetensors` takes the place of the vision–language projector" if (
        set(adapters) - set(LORA_SUBTREES)) else ""
    text = ("The personalised adapters of one client of a federated run.\n\n`adapter_model.safetensors` is a PEFT LoRA "
            f"of the language model{connector}. `pilot_jax.torch.load` loads them in torch "
            "(`docs/exported-adapters.md` of pilot_jax).")
    more = [("LoRA rank here", lora_rank(lora)), *_storage(run),
            *([("part of the change of the weights that this rank loses", f"{lost:.2g}")] if lost > 1e-6 else [])]
    # Towers of the families of CLIP have modules named as the language model's are.
    alike = model.parts is None and fed.model.config.tower.family != "dinov2"
    save_adapters(out, adapters, lora, stage=connector_stage(state.stage), tasks=fed.tasks,
                  task_index=fed.task_index(number), alpha_over_rank=model.lora.alpha / own_rank,
                  kind="llava" if model.parts is None else "language_model", base=base_name(run, base),
                  exclude=r"(.*\.)?vision_tower\..*" if alike else None, about=_about(run, client, base),
                  card=card(run, client, text, library="peft", more=more, licence=licence, base=base))
    return lost


def merge_client(run: Run, client: str, out: str | Path, licence: str | None = None, base: str | None = None) -> None:
    """Writes a client's whole model into the new folder `out`: a stock checkpoint, which needs nothing of this package.

    It is a LLaVA directory, or that of a language model if the base is one alone. Each tensor has the data type of the
    base's; of a base of separate parts, all have the language model's, or float16 where that is quantised.

    Args:
        licence: the licence that the model card names; None: unknown.
        base: the base model's name, such as its name on a hub; None: the path that the run read.

    Raises:
        InputError: see `_adapters`; or the connector is not LLaVA's projector.
    """
    out = Path(out)
    adapters, fed = _adapters(run, client, out, "--merged"), run.federation
    beyond = sorted(set(adapters) - {*LORA_SUBTREES, "projector"})
    if beyond:
        raise InputError(f"--merged: {fed.strategy.name} trains visual adapters ({', '.join(beyond)}), for which a "
                         "stock LLaVA model has no place. Write the adapters instead (pilot-jax export RUN --client K "
                         "--out DIR) and load them with pilot_jax.torch, or train with a strategy that keeps LLaVA's "
                         "projector, such as fedavg. Nothing was written.")
    lora = assembled(adapters)
    assert lora is not None  # every strategy trains one
    if RESIDUAL in adapters:
        lora = joined(lora, adapters[RESIDUAL])
    changed = changes(lora, fed.model.module.lora_scale, adapters.get("projector"))
    spec, template = fed.model.config, run.evaluation.data.template
    text = ("The model of one client of a federated run. LoRA is merged into the language model"
            + (", and the projector is the client's" if "projector" in adapters else "")
            + ". `chat_template.jinja` writes prompts as in training.")
    with new_folder(out) as folder:
        write_checkpoint(folder, run.setup.model, spec, changed)
        stock.add_chat(folder, chat_template(template, run.tokenizer), stop_tokens(run.tokenizer, template))
        if spec.vision is not None:
            stock.add_processor(folder, spec)
        about = card(run, client, text, library="transformers", more=_storage(run), licence=licence,
                     base=base)
        (folder / "README.md").write_text(about, encoding="utf-8")
