"""Prints the tables of scores, plans and score matrices."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


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
    typer.echo(f"{summary['client_steps']} client steps{'' if speed is None else f', {speed:.1f}/s'}; "
               f"{summary['bytes_up'] / 1e6:.1f} MB up, {summary['bytes_down'] / 1e6:.1f} MB down; "
               f"{summary['wall_seconds']:.0f} s with evaluation, of which compiling "
               f"{summary['compile_seconds']:.0f} s")
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in summary.get("memory_bytes", {}).items())
    typer.echo(f"peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB{f', of which {parts}' if parts else ''}")
    if summary.get("quarantined"):
        typer.echo(f"{summary['quarantined']} uploads were refused; metrics.jsonl says why (key `fault`)")
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
        table.add_column(column, justify="right")

    def shown(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    for task in summary["tasks"]:
        for client in summary["clients"]:
            if summary["task_by_client"][client] == task and client in own:
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


def scaled(value: float) -> str:
    """Returns a number with a decimal prefix, such as "1.5 G", to which its unit can be added."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g} "


def print_plan(plan: dict) -> None:
    if "choices" in plan:
        typer.echo(plan["choices"])
    devices = f"{plan['devices']} device{'s' * (plan['devices'] > 1)}"
    rounds = f"{plan['rounds']} round{'s' * (plan['rounds'] > 1)}"
    image = f", {plan['image_tokens']} of them for the image" if plan["image_tokens"] else ""
    typer.echo(f"{plan['clients']} clients, {plan['tasks']} tasks, {rounds}, {devices}; the longest sequence has "
               f"{plan['longest_sequence']} tokens{image}")
    if plan["assumed"]:
        typer.echo(f"Assumed: {plan['assumed']}")
    memory = plan["memory_per_device"]
    kinds = list(dict.fromkeys(kind for row in memory.values() for kind in row if kind != "total"))
    most = max(row["total"] for row in memory.values())
    unit, size = ("GB", 1e9) if most >= 1e9 else ("MB", 1e6)
    table = Table(title=f"Memory per device, {unit}")
    for column in ("", *memory):
        table.add_column(column, justify="right" if column else "left")
    for kind in [*kinds, "total"]:
        table.add_row(kind, *(f"{row[kind] / size:.2f}" if kind in row else "–" for row in memory.values()),
                      style="bold" if kind == "total" else None)
    columns = {"round_1": "round 1", "later_rounds": "later rounds", "finetuning": "fine-tuning"}
    columns = {key: title for key, title in columns.items() if key in plan["client_steps"]}
    by_round = Table(title="Per round, all clients together")
    for column in ("", *columns.values()):
        by_round.add_column(column, justify="right" if column else "left")
    for key, unit, divisor in (("client_steps", "", 1), ("flops", "TFLOP", 1e12), ("bytes_up", "MB", 1e6),
                               ("bytes_down", "MB", 1e6)):
        label = f"{key.replace('_', ' ')}{f', {unit}' if unit else ''}"
        by_round.add_row(label, *(f"{plan[key][r] / divisor:,.0f}" for r in columns))
    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(table, by_round)
    moved = max(sum(kinds.values()) for kinds in plan["bytes_between_devices_per_step"].values())
    if moved:
        typer.echo(f"Between devices: each receives {scaled(moved)}B in a step, for weights and gradients")
    server = plan["server"]
    typer.echo(f"The server: {scaled(server['flops'])}FLOP for each aggregation, {scaled(server['bytes'])}B")
    typer.echo("Parameters: " + ", ".join(f"{n} {v:,}" for n, v in plan["parameters"].items()))
    for stage, size in plan.get("lowered", {}).items():
        typer.echo(f"The program {stage} can be lowered for {devices} ({size:,} characters).")


def print_matrix(result: dict) -> None:
    table = Table(title=f"Score of the row's model on the column's {result['split']} data")
    base = result["base_captions"]
    columns = [*result["clients"], *result["tasks"], *(["pretraining captions"] if base else [])]
    for name in ("", *columns):
        table.add_column(escape(name), justify="right" if name else "left")
    for i, client in enumerate(result["clients"]):
        own = [f"{v:.2f}" for v in (*result["scores"][i], *result["by_task"][client].values())]
        own[i] = f"[bold]{own[i]}[/bold]"
        table.add_row(escape(client), *own, *([f"{base['clients'][i]:.2f}"] if base else []))
    Console(width=None if sys.stdout.isatty() else 20 + 11 * len(columns)).print(table)
    if base:
        typer.echo(f"Score of the base model on the pretraining captions: {base['base']:.2f}")
