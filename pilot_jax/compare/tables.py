"""Makes the tables of a comparison and of a sweep, as rows of cells for the HTML page and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pilot_jax.compare.difference_table import (
    difference_cell,
    difference_explanations,
    difference_to,
    references_of,
    title,
)
from pilot_jax.report.rendering import decimal
from pilot_jax.words import counted

Record = dict[str, Any]  # a JSON object: `results.json`, or a variant's entry in it

# Names of the answers that look at no picture, by their key in `results["guesses"]`.
GUESS_TITLES = {"majority": "most common answer", "question": "answer by question"}


def by_score(results: Record) -> list[Record]:
    """Returns the variants from worst to best."""
    return sorted(results["variants"], key=lambda line: line["score"])


def tasks_of(results: Record) -> list[str]:
    """Returns the tasks that some variant has a score for."""
    return sorted({task for line in results["variants"] for task in line["by_task"]})


def _score(line: Record) -> str:
    return decimal(line["score"]) + ("" if line["standard_error"] is None else f" ± {line['standard_error']:.3f}")


def _megabytes(line: Record) -> float | None:
    """Returns the MB that the run of one seed uploads and downloads; None if that is not known."""
    up, down = line["bytes_up"], line["bytes_down"]
    return None if up is None or down is None else (up + down) / 1e6


def _local(results: Record) -> Record | None:
    return next((line for line in results["variants"] if line["name"] == "local"), None)


def _per_megabyte(line: Record, local: Record | None) -> str:
    megabytes = _megabytes(line)
    if not megabytes:
        return "–"
    if local is None:
        return f"{line['score'] / megabytes:.1e}"
    return f"{(line['score'] - local['score']) / megabytes:+.1e}"


def _columns(results: Record) -> dict[str, str]:
    """Returns the titles of the scores that some variant has, by their key in a variant's entry ("own": the entry
    itself)."""
    titles = {"common": "common", "own": "own", "finetuned": "fine-tuned", "token_accuracy": "token accuracy"}
    return {key: title for key, title in titles.items()
            if key == "own" or any(line.get(key) for line in results["variants"])}


def explanations(results: Record) -> list[str]:
    """Returns one sentence for each column of `score_rows` that is not plain from its name."""
    about = {
        "common": "common: score of the server's model, which is the same for all clients; – where clients have models "
                  "or parts of their own.",
        "own": "own: score of the model with which each client ends. All other columns are about this one.",
        "finetuned": "fine-tuned: score of each client's model after further steps on the client's own data.",
        "token_accuracy": "token accuracy: mean share of the tokens of a reference answer that are the most probable "
                          "ones (`eval.scoring: teacher_forced`)."}
    guesses = ["most common answer: the score of each client's most common training answer. Answer by question: of the "
               "most common one to the same question in the training data of the task. No picture is looked at."]
    return [
        *(about[key] for key in _columns(results)), *(guesses if results.get("guesses") else []),
        *difference_explanations(results),
        "effective neighbours: mean over clients in the last phase; the client itself counts as one.",
        "pretraining captions: score on captions like those that the embedded base model was pretrained on.",
        "rates ×: factor on the config's learning rates.",
        "MB up, MB down: uploaded and downloaded by all clients in the run of one seed.",
        "gain per MB: the score minus that of local, divided by MB up + MB down." if _local(results) else
        "score per MB: the score divided by MB up + MB down.",
        "server MFLOP, server MB: computed in one aggregation, and held for it, by the formulas of `pilot-jax plan`."]


def score_rows(results: Record) -> list[list[str]]:
    """Returns the header row, the variants from best to worst, answers without a picture, and the base model."""
    tasks, columns, against, local = tasks_of(results), _columns(results), references_of(results), _local(results)
    rows = [["", *columns.values(), *tasks, *(f"{title(name)} [95 %]" for name in against), "effective neighbours",
             "pretraining captions", "rates ×", "MB up", "MB down", f"{'gain' if local else 'score'} per MB",
             "server MFLOP", "server MB", "seconds"]]
    for line in sorted(results["variants"], key=lambda one: -one["score"]):
        name = line["name"] + (f" ({line['diverged']} diverged)" if line["diverged"] else "")
        name += f" ({counted(line['quarantined'], 'upload')} refused)" if line.get("quarantined") else ""
        up, down = (None if line[k] is None else line[k] / 1e6 for k in ("bytes_up", "bytes_down"))
        work, held = (line["server"][k] / 1e6 if line.get("server") else None for k in ("flops", "bytes"))
        scores = [line if key == "own" else line.get(key) for key in columns]
        rows.append([name, *("–" if score is None else _score(score) for score in scores),
                     *(decimal(line["by_task"].get(t)) for t in tasks),
                     *(difference_cell(line, reference) for reference in against),
                     decimal(line["effective_neighbors"], 1), decimal(line["base_captions"], 2),
                     f"{line['rate_factor']:g}", decimal(up, 1), decimal(down, 1), _per_megabyte(line, local),
                     decimal(work, 1), decimal(held, 1), f"{line['wall_seconds']:.0f}"])
    for way, name in GUESS_TITLES.items() if results.get("guesses") else ():
        found = results["guesses"][way]
        rows.append([name, *(decimal(found["score"]) if key == "own" else "" for key in columns),
                     *(decimal(found["by_task"].get(t)) for t in tasks), *[""] * (len(against) + 9)])
    rows.append(["base model", *(decimal(results["base"]["score"]) if key == "own" else "" for key in columns),
                 *[""] * (len(tasks) + len(against) + 1), decimal(results["base"]["base_captions"], 2), *[""] * 7])
    return rows


def fitting_rows(results: Record, width: int) -> list[list[str]]:
    """Returns those columns of `score_rows` that a terminal of `width` characters has room for.

    The order of importance is own scores, differences, other scores. Intervals are in a line of their own if the
    differences to all references do not fit otherwise. Names may be cut to 16 characters for the first two columns,
    and to 30 for the others.
    """
    rows, tasks = score_rows(results), tasks_of(results)
    against = [f"{title(name)} [95 %]" for name in references_of(results)]
    others = ["fine-tuned", "common", "token accuracy", "gain per MB", "score per MB", "rates ×"]
    first = ["own", *against, *others, *tasks]
    order = sorted(range(1, len(rows[0])), key=lambda i: (*first, rows[0][i]).index(rows[0][i]))
    kept: list[int] = []
    for between in (" ", "\n"):
        cells = [[row[0], *(cell.replace(" [", between + "[") for cell in row[1:])] for row in rows]
        kept = _fitting([max(len(part) for row in cells for part in row[i].split("\n")) for i in range(len(rows[0]))],
                        order, width)
        if all(rows[0].index(name) in kept for name in against):
            break
    return [[row[i] for i in (0, *sorted(kept))] for row in cells]


def _fitting(widths: Sequence[int], order: Sequence[int], width: int) -> list[int]:
    """Returns the columns, the first ones of `order`, that fit beside column 0; each has 3 characters around it."""
    kept: list[int] = []
    for i in order:
        name = min(widths[0], 16 if len(kept) < 2 else 30)
        if 4 + name + sum(3 + widths[j] for j in (*kept, i)) > width:
            break
        kept.append(i)
    return kept


def tuning_rows(results: Record) -> list[list[str]]:
    """Returns the header row, and each strategy's validation score by factor on the learning rates.

    The last column has the chosen factor."""
    factors = [f"{f:g}" for f in results["factors"]]
    rows = [["", *(f"× {f}" for f in factors), "chosen"]]
    for family, rate in results["rates"].items():
        rows.append([family, *(decimal(rate["validation"].get(f)) for f in factors), f"× {rate['factor']:g}"])
    return rows


def markdown(rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
                     for row in (rows[0], rule, *rows[1:]))


def table(results: Record) -> str:
    """Returns `score_rows` as Markdown."""
    *rows, base = score_rows(results)
    return markdown([*rows, [f"*{base[0]}*", *base[1:]]])


def tuning_table(results: Record) -> str:
    """Returns `tuning_rows` as Markdown, with the score of the chosen factor in bold."""
    (*head, _), *lines = tuning_rows(results)
    return markdown([head, *([f"**{cell}**" if name == best else cell for name, cell in zip(head, cells, strict=True)]
                              for *cells, best in lines)])


def of_variant(name: str, compared: Sequence[Record]) -> list[Record]:
    """Returns the entry of the variant `name` in each of several comparisons."""
    return [next(line for line in results["variants"] if line["name"] == name) for results in compared]


def sweep_table(key: str, values: Sequence[str], compared: Sequence[Record]) -> str:
    """Returns, as Markdown, the score of each variant (rows) at each value of a config key (columns).

    A star marks a significant difference to Pilot.
    """
    rows = [["", *(f"{key} = {value}" for value in values)]]
    for name in (line["name"] for line in compared[0]["variants"]):
        rows.append([name, *(_score(line) + (" *" if (difference_to(line) or {}).get("significant") else "")
                             for line in of_variant(name, compared))])
    return markdown(rows)
