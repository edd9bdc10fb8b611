"""The command line. Commands only: the work is in the modules they call. Exit 0 done, 1 failed run, 2 bad input."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from pilot_jax.errors import InputError, Interrupted
from pilot_jax.terminal import print_matrix, print_plan, print_scores, printable

app = typer.Typer(name="pilot-jax", no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Federated multimodal instruction tuning in JAX: Pilot, its baselines, its ablations.")
data_app = typer.Typer(no_args_is_help=True, help="Make or check data sets.")
app.add_typer(data_app, name="data")


def _complete_key(incomplete: str) -> list[tuple[str, str]]:
    """Config keys that begin so, for shells."""
    from pilot_jax.config import known_keys

    return [(f"{key}=", text) for key, text in known_keys().items() if text and key.startswith(incomplete)]


ConfigPath = Annotated[Path, typer.Argument(help="YAML config, see configs/.")]
Overrides = Annotated[list[str] | None, typer.Option(
    "--set", help="Override a key: section.key=value. Repeatable.", autocompletion=_complete_key)]
RunPath = Annotated[Path, typer.Argument(help="A run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def run(config: ConfigPath, overrides: Overrides = None,
        out: Annotated[Path | None, typer.Option(help="New run directory; default runs/<config>-<time>.")] = None,
        resume: Annotated[bool, typer.Option(
            "--resume", help="Go on with the run in --out; if none is there, begin it.")] = False,
        progress_: Annotated[str, typer.Option(
            "--progress", help="auto; json: events and the summary, a line each; quiet: warnings alone.")] = "auto",
        coordinator: Annotated[str | None, typer.Option(
            help="host:port of process 0, where several processes run one federation.")] = None,
        num_processes: Annotated[int | None, typer.Option(min=1, help="With --coordinator: how many.")] = None,
        process_id: Annotated[int | None, typer.Option(min=0, help="With --coordinator: which this is.")] = None,
        distributed: Annotated[bool, typer.Option(
            help="Several processes, of which Slurm, a TPU pod or MPI tells.")] = False) -> None:
    """Simulate a federation and write its run directory."""
    import threading
    import time

    from pilot_jax import hosts
    from pilot_jax.config import load_config
    from pilot_jax.federation.federation import Federation
    from pilot_jax.federation.sharding import ask_for_determinism, split_cpu
    from pilot_jax.federation.simulation import simulate, steps_by_stage
    from pilot_jax.forecast import forecast, told
    from pilot_jax.metrics import ProgressDisplay

    if progress_ not in ("auto", "json", "quiet"):
        raise InputError(f"--progress: {progress_!r}, expected auto, json or quiet.")
    settings = load_config(config, overrides)
    ask_for_determinism(settings.system)
    split_cpu(settings.system, num_processes or 1)
    if distributed or coordinator is not None or num_processes is not None or process_id is not None:
        hosts.start(coordinator, num_processes, process_id)
    folder = out or Path("runs") / f"{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    displays: list[ProgressDisplay] = []
    asides: list[threading.Thread] = []

    def expectation(fed: Federation) -> str:
        try:
            return told(forecast(fed))
        except Exception as error:  # the run does not depend on it
            return f"warning: no forecast: {type(error).__name__}: {error}"

    def progress(fed: Federation) -> ProgressDisplay:
        import jax

        total, rounds = sum(steps_by_stage(fed).values()), settings.federation.rounds
        display = ProgressDisplay(total, mode=progress_, rounds=rounds)
        display({"kind": "note", "text":
            f"{fed.strategy.name}: {len(fed.clients)} clients, {len(fed.tasks)} tasks ({', '.join(fed.tasks)}), "
            f"{rounds} round{'s' * (rounds > 1)}, {total} client steps on {jax.devices()[0].device_kind} → {folder}"})
        displays.append(display)
        if jax.process_count() == 1:  # while the first program is compiled
            asides.append(threading.Thread(target=lambda: display({"kind": "note", "text": expectation(fed)})))
            asides[0].start()
        return display

    try:
        if resume and out is None:
            raise InputError("--resume: which run? Give its folder as --out.")
        result = simulate(settings, out=folder, resume=resume, progress=progress if hosts.is_writer() else None)
    except (Interrupted, KeyboardInterrupt) as stop:  # the second before anything is trained
        if hosts.is_writer():
            typer.echo(f"\nInterrupted. {_how_to_go_on(folder)}", err=True)
        raise typer.Exit(128 + getattr(stop, "signum", signal.SIGINT)) from None
    except FloatingPointError as error:
        typer.echo(f"Failed: {printable(str(error))}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(f"Failed: {printable(str(error))}. {_how_to_go_on(folder)}", err=True)
        raise typer.Exit(1) from None
    finally:
        for thread in asides:
            thread.join()
        for display in displays:
            display.close()
    if hosts.is_writer() and progress_ == "json":
        typer.echo(json.dumps({"kind": "summary", "folder": str(folder)} | result.summary))
    elif hosts.is_writer() and progress_ == "auto":
        print_scores(result.summary)
        typer.echo(f"Run directory: {folder}")


def _how_to_go_on(folder: Path) -> str:
    if not (folder / "config.yaml").is_file():
        return "Nothing was written."
    return f"To go on: pilot-jax run {folder / 'config.yaml'} --out {folder} --resume"


@app.command()
def report(runs: Annotated[list[Path], typer.Argument(
               help="Run directories, several side by side; or a comparison's folder or results.json.")],
           out: Annotated[Path | None, typer.Option(help="The page; default report.html in the first of them.")] = None,
           answers: Annotated[int, typer.Option(
               min=0, help="Answers shown of each task; 0: no model is loaded, nothing asked.")] = 2,
           asked: Annotated[int, typer.Option(
               min=0, help="Of each client's prompts, how many every model answers, for what each can do.")] = 8
           ) -> None:
    """One HTML page of runs, finished or not, or of what `compare` wrote, and every figure as PNG beside it."""
    from pilot_jax.config import SystemConfig
    from pilot_jax.federation.sharding import split_cpu
    from pilot_jax.report.page import write_report

    split_cpu(SystemConfig())
    default = runs[0].with_suffix(".html") if runs[0].is_file() else runs[0] / "report.html"
    page, *pictures = write_report(runs, out or default, answers, asked)
    typer.echo(f"{page}, and {len(pictures)} figures in {page.with_suffix('')}")


@app.command()
def schema() -> None:
    """The config's JSON schema, for editors: pilot-jax schema > schema.json."""
    from pilot_jax.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))


@app.command()
def roles(config: ConfigPath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Who owns which parameter: trained, frozen, sent, aggregated; with sizes. Allocates nothing."""
    from pilot_jax.config import load_config
    from pilot_jax.federation.ownership import ownership_table

    rows = ownership_table(load_config(config, overrides))
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Who owns which parameter (per client; bytes as float32)")
    for column in rows[0]:
        table.add_column(column, justify="right" if column in ("parameters", "bytes") else "left")
    for entry in rows:
        table.add_row(*(f"{v:,}" if isinstance(v, int) else v for v in entry.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None,
         samples: Annotated[int, typer.Option(min=1, help="Samples per client, if the data are not there.")] = 1000,
         tasks: Annotated[int, typer.Option(min=1, help="Tasks, if the data are not there.")] = 3,
         text_tokens: Annotated[int, typer.Option(min=8, help="Text tokens of the longest sample, likewise.")] = 128,
         lower: Annotated[bool, typer.Option(help="Also lower every program for the mesh.")] = False,
         platform: Annotated[str, typer.Option(
             help="With --lower: cpu, cuda or tpu, which need not be there. Default: what is here.")] = "",
         as_json: AsJson = False) -> None:
    """Memory per device, FLOPs and bytes per round, before anything is loaded or allocated."""
    from pilot_jax.config import load_config
    from pilot_jax.federation.plan import make_plan
    from pilot_jax.federation.sharding import split_cpu

    if platform not in ("", "cpu", "cuda", "tpu"):
        raise InputError(f"--platform: {platform!r}, expected cpu, cuda or tpu.")
    settings = load_config(config, overrides)
    if lower:
        split_cpu(settings.system)  # a mesh of any size can be lowered on CPU devices that are not there
    assumed = {"samples": samples, "tasks": tasks, "text_tokens": text_tokens}
    result = make_plan(settings, **assumed)
    if lower:
        from pilot_jax.federation.lowering import programs

        result["lowered"] = {name: len(program.export(platform).mlir_module_serialized if platform
                                       else program.lower().as_text())
                             for name, program in programs(settings, **assumed).items()}
    if as_json:
        typer.echo(json.dumps(result, indent=1))
        return
    print_plan(result)


@app.command()
def evaluate(run_dir: RunPath, split: Annotated[str, typer.Option(help="test or validation.")] = "test",
             matrix: Annotated[bool, typer.Option(help="Also on every other client's data, and on the base's own "
                                                  "captions (embedded base).")] = False,
             samples: Annotated[int | None, typer.Option(min=1, help="With --matrix: of each client.")] = None,
             as_json: AsJson = False) -> None:
    """Score every client's personalised model on its own data; with --matrix on everybody's."""
    from pilot_jax.federation.examination import evaluate as score
    from pilot_jax.federation.examination import evaluation_matrix
    from pilot_jax.federation.simulation import restore

    if split not in ("test", "validation"):
        raise InputError(f"--split: {split!r}, expected test or validation.")
    done = restore(run_dir)
    if matrix:
        result = evaluation_matrix(done.federation, done.tokenizer, done.population, split, samples)
        if as_json:
            typer.echo(json.dumps(result, indent=1))
        else:
            print_matrix(result)
        return
    by_client = score(done.federation, done.tokenizer, done.population, split)
    if not by_client:
        raise InputError(f"data.path: no client has {split} samples.")
    mean = sum(by_client.values()) / len(by_client)
    if as_json:
        typer.echo(json.dumps({"split": split, "score_mean": mean, "score_by_client": by_client}, indent=1))
        return
    for client, value in by_client.items():
        typer.echo(f"{client:<24} {value:.3f}")
    typer.echo(f"{'mean':<24} {mean:.3f}")


@app.command()
def compare(config: ConfigPath,
            strategies: Annotated[str, typer.Option(
                help="Comma-separated: strategies, groups (all, ablations, ata), pilot-<ablation>, "
                     "name+section.key=value.")],
            seeds: Annotated[int, typer.Option(min=1, help="Trained together, as more clients.")] = 3,
            rates: Annotated[str, typer.Option(
                help="Factors on the learning rates to choose from by validation score, for each strategy: 0.1,0.3,1. "
                     "Default: no tuning.")] = "",
            split: Annotated[str, typer.Option(help="Scored: test, or validation to choose by.")] = "test",
            vary: Annotated[str, typer.Option(
                help="section.key=v1,v2,…: one comparison for each value, in a folder of its own, and a table of all."
            )] = "",
            overrides: Overrides = None,
            out: Annotated[Path | None, typer.Option(help="Folder; what is done there is not done again.")] = None,
            as_json: AsJson = False) -> None:
    """Strategies and ablations × seeds, on the same data and steps: a table with paired differences to Pilot."""
    from pilot_jax.compare import compare as run_comparison
    from pilot_jax.compare import read_variants
    from pilot_jax.comparison_report import table, write_sweep
    from pilot_jax.config import load_config
    from pilot_jax.federation.sharding import split_cpu

    settings, variants = load_config(config, overrides), read_variants(strategies)
    key, _, listed = vary.partition("=")
    values = [value.strip() for value in listed.split(",") if value.strip()]
    if vary and not values:
        raise InputError(f"--vary: {vary!r}, expected section.key=v1,v2,… such as data.digits.train=60,240.")
    varied = [load_config(config, [*(overrides or []), f"{key}={value}"]) for value in values]
    try:
        factors = [float(x) for x in rates.split(",") if x.strip()]
    except ValueError:
        raise InputError(f"--rates: {rates!r}, expected numbers such as 0.1,0.3,1.") from None
    if split not in ("test", "validation"):
        raise InputError(f"--split: {split!r}, expected test or validation.")
    if any(not f > 0 for f in factors):
        raise InputError(f"--rates: {rates!r}, factors must be above 0.")
    split_cpu(settings.system)
    folder = out or Path("runs") / f"compare-{config.stem}"

    def say(text: str) -> None:
        typer.echo(text, err=as_json)

    try:
        done = []
        for value, one in zip(values, varied, strict=True):
            say(f"{key} = {value}")
            done.append(run_comparison(one, variants, seeds, folder / _folder_of(value), factors=factors,
                                       split=split, say=say))
        results = {} if done else run_comparison(settings, variants, seeds, folder, factors=factors, split=split,
                                                 say=say)
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted. Finished variants are in {folder}; the same command goes on from there.", err=True)
        raise typer.Exit(130) from None
    shown = write_sweep(key, values, done, folder) if done else table(results)
    typer.echo(json.dumps(done or results, indent=1) if as_json else shown)
    say(f"Results: {folder}")


def _folder_of(value: str) -> str:
    """A value of --vary as a folder's name: no way out of the folder."""
    name = value.replace("/", "_")
    return name if name.strip(".") else name.replace(".", "_")


@app.command()
def generate(run_dir: RunPath, client: Annotated[str, typer.Option(help="Whose model answers.")],
             prompt: Annotated[str, typer.Option(help="The question.")],
             image: Annotated[Path | None, typer.Option(help="Image file; without it, text only.")] = None,
             max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
             temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
             top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 1.0,
             seed: Annotated[int, typer.Option(min=0, help="Of sampling.")] = 0) -> None:
    """Answer a question, about an image, with one client's model."""
    from pilot_jax.federation.simulation import answer, restore

    if image is not None and not image.is_file():
        raise InputError(f"--image: {image} does not exist.")
    done = restore(run_dir)
    settings = done.config.eval.model_copy(
        update={"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p})
    typer.echo(answer(done, client, image, prompt, settings, seed))


@app.command()
def export(run_dir: RunPath, client: Annotated[str, typer.Option(help="Whose adapters.")],
           out: Annotated[Path, typer.Option(help="New folder.")]) -> None:
    """Write a client's LoRA as a PEFT adapter and its connector as safetensors, with a model card."""
    from pilot_jax.federation.export import export_client
    from pilot_jax.federation.simulation import restore

    export_client(restore(run_dir), client, out)
    typer.echo(f"Adapters of {client}: {out}")


@app.command()
def pretrain(config: ConfigPath,
             out: Annotated[Path, typer.Argument(help="New Hugging Face LLaVA directory.")]) -> None:
    """Train the embedded base on captions of digit scenes."""
    from pilot_jax.pretrain import load_pretrain_config
    from pilot_jax.pretrain import pretrain as train

    train(out, load_pretrain_config(config), typer.echo)
    typer.echo(f"Base model: {out}")


@data_app.command("digits")
def data_digits(out: Annotated[Path, typer.Argument(help="New folder.")],
                scenario: Annotated[str, typer.Option(help="a: 3 tasks × 3 clients; b: 4 × 5.")] = "a",
                train: Annotated[int, typer.Option(min=1)] = 480, validation: Annotated[int, typer.Option(min=1)] = 16,
                test: Annotated[int, typer.Option(min=1)] = 48, seed: Annotated[int, typer.Option(min=0)] = 0) -> None:
    """Write the embedded digit scenes as a LLaVA data set."""
    from pilot_jax.data.digits import SCENARIOS, scenario_clients, scene_samples
    from pilot_jax.data.llava import write_samples

    if scenario not in SCENARIOS:
        raise InputError(f"--scenario: {scenario!r}, expected one of {', '.join(SCENARIOS)}.")
    count = write_samples(scene_samples(scenario_clients(scenario, train, validation, test), seed), out)
    typer.echo(f"{count} samples in {out / 'data.json'}, images in {out / 'images'}")


@data_app.command("check")
def data_check(path: Annotated[Path, typer.Argument(help="Data file or folder.")],
               image_root: Annotated[Path | None, typer.Option(help="Folder that `image` is relative to.")] = None,
               model: Annotated[str | None, typer.Option(help="LLaVA directory whose tokens count lengths.")] = None,
               template: Annotated[str, typer.Option(help="Conversation template.")] = "vicuna_v1",
               max_length: Annotated[int, typer.Option(min=8, help="Tokens a run would keep.")] = 2048,
               file_names: Annotated[str, typer.Option(help="What a file's name says: task | client.")] = "task",
               ) -> None:
    """Read a data set as `run` would, images included: counts, lengths, and everything that is wrong with it."""
    from pilot_jax.config import parse_config
    from pilot_jax.data.check import check_data

    settings = parse_config({"data": {"image_root": None if image_root is None else str(image_root),
                                      "template": template, "max_length": max_length, "file_names": file_names}},
                            "data check").data
    loaded = None
    if model is not None:
        from pilot_jax.data.conversations import stop_tokens
        from pilot_jax.models.pretrained import load

        loaded = load(model)
        stop_tokens(loaded.tokenizer(), template)
    report = check_data(path, settings, loaded)
    for (task, client, split), count in report.counts.items():
        typer.echo(f"{task:<16} {client or '(no client)':<20} {split:<12} {count:>7}")
    for low, high, count in report.lengths:
        typer.echo(f"{low:>6} to {high:>6} {report.length_unit:<12} {count:>7}")
    for warning in report.warnings:
        typer.echo(f"Warning: {warning}.")
    if report.errors:
        for error in report.errors[:20]:
            typer.echo(f"Error: {printable(error)}", err=True)
        more = f" ({len(report.errors) - 20} not shown)" if len(report.errors) > 20 else ""
        typer.echo(f"{len(report.errors)} errors{more}", err=True)
        raise typer.Exit(2)
    typer.echo(f"{sum(report.counts.values())} samples, all readable")


def main() -> None:
    """Entry point: bad input ends in one message and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        app()
    except InputError as error:
        typer.echo(f"Error: {printable(str(error))}", err=True)
        sys.exit(2)
