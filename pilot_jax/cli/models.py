"""The commands `evaluate`, `generate`, `export`, `base` and `pretrain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pilot_jax.cli.options import AsJson, ConfigPath, RunPath, RunStrategy, Use, check_choice, complete_client
from pilot_jax.cli.tables import print_matrix
from pilot_jax.errors import InputError


def evaluate(run_dir: RunPath,
             split: Annotated[str, typer.Option(help="Split that is scored: test or validation.")] = "test",
             matrix: Annotated[bool, typer.Option(
                 help="Also score each model on every other client's data and, with the embedded base model, on the "
                      "captions that it was pretrained on.")] = False,
             samples: Annotated[int | None, typer.Option(
                 min=1, help="With --matrix: number of each client's samples to use. Default: all.")] = None,
             strategy: RunStrategy = None, use: Use = None, as_json: AsJson = False) -> None:
    """Score every client's personalised model on its own held-out data, or with --matrix on all clients' data."""
    from pilot_jax.evaluation.personalised import evaluate as score
    from pilot_jax.evaluation.personalised import evaluation_matrix
    from pilot_jax.runs.restore import restore

    check_choice("--split", split, "test", "validation")
    done = restore(run_dir, strategy=strategy)
    if matrix:
        result = evaluation_matrix(done.evaluation, done.population, split, samples)
        if as_json:
            typer.echo(json.dumps(result, indent=1))
        else:
            print_matrix(result)
        return
    by_client = score(done.evaluation, done.population, split)
    if not by_client:
        raise InputError(f"data.path: no client has {split} samples. Name their split, or train another run with "
                         f"data.hold_out.{split}.")
    mean = sum(by_client.values()) / len(by_client)
    if as_json:
        typer.echo(json.dumps({"split": split, "score_mean": mean, "score_by_client": by_client}, indent=1))
        return
    for client in (c.name for c in done.evaluation.clients):
        typer.echo(f"{client:<24} " + (f"{by_client[client]:.3f}" if client in by_client else f"no {split} data"))
    typer.echo(f"{'mean':<24} {mean:.3f}")


def generate(run_dir: RunPath, client: Annotated[str, typer.Option(
                 help="Client whose model answers.", autocompletion=complete_client)],
             prompt: Annotated[str, typer.Option(help="Question to answer.")],
             image: Annotated[Path | None, typer.Option(help="Image file. Default: no image.")] = None,
             max_new_tokens: Annotated[int, typer.Option(min=1, help="Largest number of tokens of the answer.")] = 64,
             temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 decodes greedily.")] = 0.0,
             top_p: Annotated[float, typer.Option(
                 min=0.01, max=1, help="Probability mass from which tokens are sampled.")] = 1.0,
             seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
             strategy: RunStrategy = None, use: Use = None) -> None:
    """Answer a question, with or without an image, with the personalised model of one client."""
    from pilot_jax.runs.listing import check_client
    from pilot_jax.runs.restore import answer, restore

    check_client(run_dir, client)
    if image is not None and not image.is_file():
        raise InputError(f"--image: {image} {'is a folder' if image.is_dir() else 'does not exist'}.")
    done = restore(run_dir, strategy=strategy)
    settings = done.setup.eval.model_copy(
        update={"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p})
    typer.echo(answer(done, client, image, prompt, settings, seed))


def export(run_dir: RunPath, client: Annotated[str, typer.Option(
               help="Client whose model is exported.", autocompletion=complete_client)],
           out: Annotated[Path | None, typer.Option(
               help="New folder for the adapters: LoRA, connector, and how the model is asked.")] = None,
           merged: Annotated[Path | None, typer.Option(
               help="New folder for the whole model, instead of --out: a stock LLaVA checkpoint (or that of a language "
                    "model) with LoRA merged into it. Not for strategies with visual adapters, such as pilot.")] = None,
           rank: Annotated[int | None, typer.Option(
               min=1, help="Largest rank of the exported LoRA. Default: what the adapters need; what a smaller one "
                           "loses is printed.")] = None,
           base_model: Annotated[str | None, typer.Option(
               help="Name of the base model for the model card and PEFT, such as its name on a hub. Default: the "
                    "run's path of it.")] = None,
           license: Annotated[str | None, typer.Option(help="Licence for the model card. Default: unknown.")] = None,
           push_to_hub: Annotated[str | None, typer.Option(
               metavar="REPO", help="Also upload the new folder to this repository on the Hugging Face Hub, such as "
                                    "me/my-model; it is made, private, if there is none.")] = None,
           strategy: RunStrategy = None, use: Use = None) -> None:
    """Write a client's adapters for PEFT and torch, or its whole model for transformers, with a model card."""
    from pilot_jax.runs.export import check_is_new, export_client, merge_client
    from pilot_jax.runs.hub import check_can_push, push
    from pilot_jax.runs.listing import check_client
    from pilot_jax.runs.restore import restore

    if (out is None) == (merged is None):
        raise InputError("--out, --merged: give one of them: the folder for the adapters, or for the whole model.")
    if merged is not None and rank is not None:
        raise InputError("--rank: a merged model has no LoRA. Leave the option out.")
    folder, lost = merged or out, 0.0
    assert folder is not None
    check_is_new(folder, "--out" if merged is None else "--merged")
    check_client(run_dir, client)
    if push_to_hub is not None:
        check_can_push(push_to_hub)
    run = restore(run_dir, strategy=strategy)
    if merged is not None:
        merge_client(run, client, merged, license, base_model)
    else:
        lost = export_client(run, client, folder, rank, license, base_model)
    if lost > 1e-6:
        typer.echo(f"The exported LoRA lacks {lost:.2g} of the change of the weights (Frobenius norm).")
    typer.echo(f"{'Adapters' if merged is None else 'Model'} of {client}: {folder}")
    if push_to_hub is not None:
        typer.echo(f"Uploaded: {push(folder, push_to_hub)}")


def base(name: Annotated[str, typer.Argument(help="Name of the base model: smollm2-dinov2.")],
         out: Annotated[Path, typer.Argument(help="New folder for the base model, in Hugging Face's LLaVA layout.")],
         side: Annotated[int, typer.Option(
             min=14, help="Height and width of images in pixels, a multiple of 14. An image takes (side / 14)² "
                          "tokens.")] = 56,
         projector_only: Annotated[bool, typer.Option(
             "--projector-only",
             help="Leave out the LoRA that was trained with the projector: the language model is as it was published, "
                  "and has learned no form of answers.")] = False) -> None:
    """Make a base model of a real language model and vision tower, downloaded with pip, and a trained projector."""
    from pilot_jax.real.base import build

    build(name, out, side, typer.echo, lora=not projector_only)
    typer.echo(f"Base model: {out}")


def pretrain(config: ConfigPath,
             out: Annotated[Path, typer.Argument(help="New folder for the base model, in Hugging Face's LLaVA layout.")]
             ) -> None:
    """Train a base model: the embedded one from random weights, the instructed one from that, or the projector and a
    LoRA of a real one."""
    from pilot_jax.config import read_settings, read_yaml

    raw = read_yaml(config)
    if isinstance(raw, dict) and "base" in raw:
        from pilot_jax.real.pretrain import RealPretrainConfig
        from pilot_jax.real.pretrain import pretrain as train_real

        train_real(out, read_settings(config, RealPretrainConfig), typer.echo)
    elif isinstance(raw, dict) and "start" in raw:
        from pilot_jax.embedded.instruct import InstructConfig, instruct

        instruct(out, read_settings(config, InstructConfig), typer.echo)
    else:
        from pilot_jax.embedded.pretrain import PretrainConfig
        from pilot_jax.embedded.pretrain import pretrain as train

        train(out, read_settings(config, PretrainConfig), typer.echo)
    typer.echo(f"Base model: {out}")
