"""Prints the tables of scores, plans and score matrices."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pilot_jax.words import agree, counted, decimal, duration, listed, scaled, size


def printable(text: str) -> str:
    """Returns a text with its control characters escaped, so that a file's name cannot control the terminal.

    Line breaks stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def print_scores(summary: dict) -> None:
    """Prints the scores and the costs of a run."""
    if summary["score_by_client"]:
        _print_score_table(summary)
    else:
        typer.echo("No scores: the data have no test samples. Name the split of samples, or set data.hold_out.test, "
                   "such as 0.1.")
    speed = summary["client_steps_per_second"]
    typer.echo(f"{counted(summary['client_steps'], 'client step')}{'' if speed is None else f', {speed:.1f}/s'}; "
               f"{size(summary['bytes_up'])} up, {size(summary['bytes_down'])} down; "
               f"{duration(summary['wall_seconds'])} with evaluation, of which compiling "
               f"{duration(summary['compile_seconds'])}")
    parts = ", ".join(f"{name} {size(count)}" for name, count in summary.get("memory_bytes", {}).items())
    typer.echo(f"peak memory {size(summary['peak_memory_bytes'])}{f', of which {parts}' if parts else ''}")
    if summary.get("quarantined"):
        typer.echo(f"{agree(summary['quarantined'], 'upload', 'was', 'were')} refused; metrics.jsonl says why (key "
                   "`fault`)")
    if summary.get("epsilon") is not None:
        typer.echo(f"Differential privacy of one client's uploads: ε = {summary['epsilon']:.3g}")


def _print_score_table(summary: dict) -> None:
    """Prints the score of every client, and the means by task."""
    table = Table(title="Score on held-out data, each client's own model")
    for column in ("task", "client"):
        table.add_column(column)
    own = summary["score_by_client"]
    # The common model's scores are left out where all clients end with that model.
    others = [(title, key) for title, key in (("common", "score_common"), ("fine-tuned", "score_finetuned"))
              if summary.get(f"{key}_by_client") not in (None, own)]
    for column in ("base", summary["strategy"], *(title for title, _ in others)):
        table.add_column(escape(column), justify="right")

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    for task in summary["tasks"]:
        for client in summary["clients"]:
            if summary["task_by_client"][client] != task:
                continue
            if client not in own:
                table.add_row(escape(task), escape(client), "–", "no test data", *("–" for _ in others))
            else:
                table.add_row(escape(task), escape(client), shown(summary["score_base_by_client"][client]),
                              shown(own[client]), *(shown(summary[f"{key}_by_client"][client]) for _, key in others))
        table.add_row(escape(task), "mean", shown(summary["score_base_by_task"][task]),
                      shown(summary["score_by_task"][task]),
                      *(shown(summary[f"{key}_by_task"][task]) for _, key in others), style="bold", end_section=True)
    table.add_row("all", "mean", shown(summary["score_base"]), shown(summary["score_mean"]),
                  *(shown(summary[key]) for _, key in others), style="bold")
    Console(width=None if sys.stdout.isatty() else 80).print(table)


def print_comparison(results: dict) -> None:
    """Prints the table of a comparison: as Markdown with all columns if the output is no terminal, else as many of
    them as fit, and what their marks mean."""
    from pilot_jax.compare.difference_table import difference_explanations
    from pilot_jax.compare.tables import fitting_rows, score_rows, table

    if not sys.stdout.isatty():
        typer.echo(table(results))
        return
    console = Console()
    head, *rows = fitting_rows(results, console.width)
    shown = Table()
    for i, name in enumerate(head):
        shown.add_column(escape(name), justify="right" if i else "left", no_wrap=i > 0, overflow="fold")
    for row in rows:
        shown.add_row(*map(escape, row))
    console.print(shown)
    for line in difference_explanations(results):
        console.print(escape(line), style="dim", highlight=False)
    if len(head) < len(score_rows(results)[0]):
        typer.echo("results.md has all columns.")


def print_plan(plan: dict) -> None:
    if "choices" in plan:
        typer.echo(plan["choices"])
    devices, rounds = counted(plan["devices"], "device"), counted(plan["rounds"], "round")
    image = f", {plan['image_tokens']} of them for the image" if plan["image_tokens"] else ""
    typer.echo(f"{counted(plan['clients'], 'client')}, {counted(plan['tasks'], 'task')}, {rounds}, {devices}; the "
               f"longest sequence has {counted(plan['longest_sequence'], 'token')}{image}")
    if plan["assumed"]:
        typer.echo(f"Assumed: {plan['assumed']}")
    memory = plan["memory_per_device"]
    kinds = list(dict.fromkeys(kind for row in memory.values() for kind in row if kind != "total"))
    most = max(row["total"] for row in memory.values())
    unit, divisor = ("GB", 1e9) if most >= 1e9 else ("MB", 1e6)
    table = Table(title=f"Memory per device, {unit}")
    for column in ("", *memory):
        table.add_column(column, justify="right" if column else "left")
    for kind in [*kinds, "total"]:
        table.add_row(kind, *(f"{row[kind] / divisor:.2f}" if kind in row else "–" for row in memory.values()),
                      style="bold" if kind == "total" else None)
    columns = {"round_1": "round 1", "later_rounds": "later rounds", "finetuning": "fine-tuning"}
    columns = {key: title for key, title in columns.items() if key in plan["client_steps"]}
    by_round = Table(title="Per round, all clients together")
    for column in ("", *columns.values()):
        by_round.add_column(column, justify="right" if column else "left")
    for label, key, text in (("client steps", "client_steps", "{:,}".format),
                             ("computation", "flops", lambda flops: f"{scaled(flops)}FLOP"),
                             ("uploaded", "bytes_up", size), ("downloaded", "bytes_down", size)):
        by_round.add_row(label, *(text(plan[key][r]) for r in columns))
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table, by_round)
    moved = max(sum(kinds.values()) for kinds in plan["bytes_between_devices_per_step"].values())
    if moved:
        typer.echo(f"Between devices: each receives {size(moved)} in a step, for weights and gradients")
    server = plan["server"]
    typer.echo(f"The server: {scaled(server['flops'])}FLOP for each aggregation, {size(server['bytes'])}")
    typer.echo("Parameters: " + ", ".join(f"{n} {v:,}" for n, v in plan["parameters"].items()))
    for stage, length in plan.get("lowered", {}).items():
        typer.echo(f"The program {stage} can be lowered for {devices} ({length:,} characters).")


def print_matrix(result: dict) -> None:
    table = Table(title=f"Score of the row's model on the column's {result['split']} data")
    base = result["base_captions"]
    columns = [*result["clients"], *result["tasks"], *(["pretraining captions"] if base else [])]
    for name in ("", *columns):
        table.add_column(escape(name), justify="right" if name else "left")
    for i, client in enumerate(result["clients"]):
        own = [decimal(v, 2) for v in (*result["scores"][i], *result["by_task"][client].values())]
        own[i] = f"[bold]{own[i]}[/bold]"
        table.add_row(escape(client), *own, *([f"{base['clients'][i]:.2f}"] if base else []))
    Console(width=None if sys.stdout.isatty() else 20 + 11 * len(columns)).print(table)
    if base:
        typer.echo(f"Score of the base model on the pretraining captions: {base['base']:.2f}")
    without = [client for client, score in zip(result["clients"], result["scores"][0], strict=True) if score is None]
    if without:
        typer.echo(f"{listed(without)}: no {result['split']} data, so no model has a score there.")
