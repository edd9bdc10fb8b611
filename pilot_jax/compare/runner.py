"""Strategies × seeds on the same base, data, steps and batches: the table, and the differences to Pilot.

All seeds of a strategy (and all learning rates, when they are tuned) are trained together, as more clients of the same
program. What is finished is on disk at once, one file per variant; the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, cast

import jax

from pilot_jax.compare.statistics import summarise
from pilot_jax.compare.variants import Variant, rate_changes
from pilot_jax.config import Config, apply_overrides
from pilot_jax.data.arrays import Prompts, aligned
from pilot_jax.evaluation.personalised import base_prompts, evaluate_together, forgetting, mean_score, score_by_task
from pilot_jax.federation.rounds import round_of, run_together
from pilot_jax.federation.state import Federation, State
from pilot_jax.federation.strategies import make_strategy
from pilot_jax.federation.strategies.base import Strategy
from pilot_jax.runs.events import CompileClock
from pilot_jax.runs.prepare import initial_state, prepare, with_strategy


@dataclasses.dataclass(frozen=True)
class Field:
    """What every variant is given alike: one federation per seed, their data padded to common shapes."""

    feds: tuple[Federation, ...]
    tokenizer: Any
    base_prompts: tuple[Prompts, ...]  # empty where the base is not the embedded one


def seeded(config: Config, seed: int) -> Config:
    """The config with `seed` added to its seeds: initialisation, sampling, batches, and the digit scenes."""
    return apply_overrides(config, [f"system.seed={config.system.seed + seed}",
                                    f"data.digits.seed={config.data.digits.seed + seed}"])


def make_field(config: Config, seeds: Sequence[int], base_samples: int = 0) -> Field:
    feds, tokenizer = [], None
    for seed in seeds:
        fed, tokenizer = prepare(seeded(config, seed), Strategy())
        feds.append(fed)
    groups = aligned([list(f.clients) for f in feds])
    feds = [dataclasses.replace(f, clients=tuple(group), model=feds[0].model)
            for f, group in zip(feds, groups, strict=True)]
    asked = [base_prompts(f, tokenizer, base_samples) for f in feds] if base_samples else []
    return Field(tuple(feds), tokenizer, tuple(asked))


def _surviving(round_: Generator[Any, Any, State]) -> Generator[Any, Any, Any]:
    """The round; its state, or None if an upload was not finite."""
    try:
        return (yield from round_)
    except FloatingPointError:
        return None


def run_all(feds: Sequence[Federation], progress: Callable[[dict], None] = lambda event: None,
            records: list[list[dict]] | None = None) -> list[State | None]:
    """All rounds of federations that train alike, together; None for one that diverged."""
    states: list[State | None] = [initial_state(fed) for fed in feds]
    records = [[] for _ in feds] if records is None else records
    for round_ in range(1, feds[0].config.federation.rounds + 1):
        alive = [i for i, state in enumerate(states) if state is not None]
        new = run_together([_surviving(round_of(feds[i], cast(State, states[i]), round_, record=records[i].append))
                            for i in alive], progress) if alive else []
        for i, state in zip(alive, new, strict=True):
            states[i] = state
    return states


def _of_variant(field: Field, variant: Variant, changes: Sequence[str]) -> list[Federation]:
    """The field's federations under a variant."""
    out = []
    for fed in field.feds:
        config = apply_overrides(fed.config, [*variant.overrides, *changes])
        out.append(with_strategy(fed, make_strategy(config.strategy, config.federation.schedule), config))
    return out


def tune(field: Field, variant: Variant, factors: Sequence[float],
         progress: Callable[[dict], None] = lambda event: None) -> dict[str, Any]:
    """Validation score of each factor on the config's learning rates, all trained together; the best one."""
    feds, at = [], []
    for factor in factors:
        for fed in _of_variant(field, variant, rate_changes(field.feds[0].config, factor)):
            feds.append(fed)
            at.append(factor)
    states = run_all(feds, progress)
    alive = [i for i, state in enumerate(states) if state is not None]
    by_client = evaluate_together([feds[i] for i in alive], field.tokenizer, [states[i].population for i in alive],
                                  "validation") if alive else []
    got: dict[float, list[float]] = {factor: [] for factor in factors}
    for i, values in zip(alive, by_client, strict=True):
        got[at[i]].append(mean_score(list(values.values())) or 0.0)
    each = len(field.feds)
    score = {factor: sum(values) / each if values else 0.0 for factor, values in got.items()}  # diverged: 0
    return {"factor": max(score, key=lambda f: (score[f], -f)), "validation": {f"{f:g}": s for f, s in score.items()}}


def run_variant(field: Field, variant: Variant, changes: Sequence[str] = (), split: str = "test",
                progress: Callable[[dict], None] = lambda event: None) -> dict[str, Any]:
    """One variant with all seeds; plain numbers."""
    began, clock = time.perf_counter(), CompileClock()
    feds = _of_variant(field, variant, changes)
    records: list[list[dict]] = [[] for _ in feds]
    states = run_all(feds, progress, records)
    trained, train_compile = time.perf_counter() - began, clock.seconds
    alive = [i for i, state in enumerate(states) if state is not None]
    populations = [states[i].population for i in alive]
    chosen = [feds[i] for i in alive]
    scored = dict(zip(alive, evaluate_together(chosen, field.tokenizer, populations, split) if alive else [],
                      strict=True))
    kept = dict(zip(alive, forgetting(chosen, field.tokenizer, populations, [field.base_prompts[i] for i in alive])
                    if alive and field.base_prompts else [[]] * len(alive), strict=True))
    clock.stop()
    seeds = []
    for i, fed in enumerate(feds):
        entry: dict[str, Any] = {"seed": fed.config.system.seed, "diverged": states[i] is None}
        by_client = scored.get(i, {})
        entry |= {"score_mean": mean_score(list(by_client.values())), "score_by_client": by_client,
                  "score_by_task": score_by_task(fed, by_client) if by_client else {},
                  "base_captions": mean_score(kept.get(i, []))}
        if states[i] is not None:
            entry |= {"bytes_up": states[i].bytes_up, "bytes_down": states[i].bytes_down,
                      "client_steps": states[i].client_steps, "quarantined": states[i].quarantined,
                      "effective_neighbors": [round(r["effective_neighbors"], 3) for r in records[i]
                                              if "effective_neighbors" in r]}
        seeds.append(entry)
    wall = time.perf_counter() - began
    return {"name": variant.name, "overrides": [*variant.overrides, *changes], "seeds": seeds, "wall_seconds": wall,
            "train_seconds": trained, "compile_seconds": clock.seconds, "train_compile_seconds": train_compile}


def _fingerprint(config: Config, variant: Variant, changes: Sequence[str], seeds: Sequence[int]) -> str:
    text = json.dumps([config.model_dump(mode="json"), variant.name, variant.overrides, list(changes), list(seeds)])
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1), encoding="utf-8")
    partial.rename(path)


def _read(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What an earlier call finished, if it was asked the same."""
    if not path.is_file():
        return None
    try:
        done = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # damaged: is done again
        return None
    return done if isinstance(done, dict) and done.get("fingerprint") == fingerprint else None


TUNING_SEED = 1000  # added to the config's seeds: no seed that is compared is tuned on


def compare(config: Config, variants: Sequence[Variant], seeds: int, out: Path, *, factors: Sequence[float] = (),
            split: str = "test", base_samples: int = 16, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run what is not yet done, and write `results.json`, `results.md` and the plots.

    Args:
        factors: if given, each strategy's learning rates are the config's times the factor with the best validation
            score on data of a seed of its own; ablations take Pilot's.
        split: what is scored: "test", or "validation" where the comparison is to decide something.
        base_samples: captions asked of every client's model, for what it has forgotten; embedded base alone.
    """
    from pilot_jax.compare.page import write_results

    began = time.perf_counter()
    base_samples = base_samples if config.model.path == "embedded" and config.model.parts is None else 0
    which = list(range(seeds))
    fields: dict[str, Field] = {}

    def field(kind: str) -> Field:  # data are prepared only if something is left to do
        if kind not in fields:
            say(f"preparing data of {'the tuning seed' if kind == 'tune' else f'{seeds} seeds'} …")
            fields[kind] = make_field(config, [TUNING_SEED] if kind == "tune" else which,
                                      0 if kind == "tune" else base_samples)
        return fields[kind]

    rates: dict[str, dict] = {}
    if factors:
        for family in dict.fromkeys(v.family for v in variants):
            variant = Variant(family, family, (f"strategy.name={family}",))
            path = out / "rates" / f"{family}.json"
            mark = _fingerprint(config, variant, [repr(f) for f in factors], [TUNING_SEED])
            done = _read(path, mark)
            if done is None:
                clock = time.perf_counter()
                done = {"fingerprint": mark} | tune(field("tune"), variant, factors)
                done["wall_seconds"] = time.perf_counter() - clock
                _write(path, done)
                say(f"{family}: rates × {done['factor']:g}, validation {done['validation']} "
                    f"({done['wall_seconds']:.0f} s)")
            rates[family] = done
    fields.pop("tune", None)
    rows: dict[str, dict] = {}
    for number, variant in enumerate(variants):
        factor = rates.get(variant.family, {}).get("factor", 1.0)
        changes = rate_changes(config, factor) if factor != 1 else []
        path = out / "variants" / f"{variant.name.replace('/', '_')}.json"
        mark = _fingerprint(config, variant, [*changes, split], which)
        done = _read(path, mark)
        if done is None:
            done = {"fingerprint": mark, "rate_factor": factor} | run_variant(field("seeds"), variant, changes, split)
            _write(path, done)
        rows[variant.name] = done
        line = summarise(variant.name, rows)
        error = "" if line["standard_error"] is None else f" ± {line['standard_error']:.3f}"
        say(f"[{number + 1}/{len(variants)}] {variant.name}: {line['score']:.3f}{error} ({done['wall_seconds']:.0f} s)")
    base_path, mark = out / "base.json", _fingerprint(config, Variant("base", "base", ()), [split], which)
    base = _read(base_path, mark)
    if base is None:
        f = field("seeds")
        nothing: list[None] = [None] * len(f.feds)
        values = evaluate_together(f.feds, f.tokenizer, nothing, split)
        captions = forgetting(f.feds, f.tokenizer, nothing, f.base_prompts) if f.base_prompts else []
        base = {"fingerprint": mark, "score": mean_score([x for v in values for x in v.values()]),
                "base_captions": mean_score([x for v in captions for x in v])}
        _write(base_path, base)
    results = {
        "config": config.model_dump(mode="json"), "split": split, "seeds": seeds, "factors": list(factors),
        "base": base,
        "device": jax.devices()[0].device_kind, "devices": jax.device_count(), "rates": rates,
        "variants": [summarise(name, rows) | {"rate_factor": rows[name]["rate_factor"]} for name in rows],
        "rows": rows, "seconds_of_this_call": time.perf_counter() - began,
        "seconds_of_all": sum(r["wall_seconds"] for r in rows.values()),
        "seconds_of_tuning": sum(r["wall_seconds"] for r in rates.values())}
    write_results(results, out)
    return results
