"""Strategies × seeds on the same base, data, steps and batches: the table, and the differences to Pilot.

All seeds of a strategy (and all learning rates, when they are tuned) are trained together, as more clients of the same
program. What is finished is on disk at once, one file per variant; the same command goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from pilot_jax.config import Config, apply_overrides
from pilot_jax.data.batches import Prompts, aligned
from pilot_jax.errors import InputError
from pilot_jax.federation.examination import (
    base_prompts,
    evaluate_together,
    forgetting,
    mean_score,
    score_by_task,
)
from pilot_jax.federation.federation import Federation, State
from pilot_jax.federation.preparation import initial_state, prepare, with_strategy
from pilot_jax.federation.rounds import round_of, run_together
from pilot_jax.federation.strategies import STRATEGIES, Strategy, make_strategy
from pilot_jax.metrics import CompileClock

# Pilot without one of its parts, or with it otherwise.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "no_difference_loss": ("train.lambda_d=0",),
    "no_client_adapter": ("strategy.client_adapter=none",),
    "client_adapter_in_stage1": ("strategy.client_adapter=stage1",),
    "no_cross_task": ("strategy.cross_task=false",),
    "no_router_losses": ("train.lambda_b=0", "train.lambda_z=0"),
    "text_mean": ("strategy.text_aggregation=mean",),
    "text_per_task_mean": ("strategy.text_aggregation=per_task_mean",),
    "copy_init": ("strategy.init=copy",),
}
# ATA's own settings: neighbours, weighting, temperature, space, and the formula of the user's notes.
ATA_SWEEP: dict[str, tuple[str, ...]] = {
    "ata_notes": ("strategy.ata.preset=notes",),
    "ata_auto": ("strategy.ata.temperature=auto", "strategy.ata.auto_factor=1"),
    "ata_auto_0.4": ("strategy.ata.temperature=auto", "strategy.ata.auto_factor=0.4"),
    "ata_auto_0.25": ("strategy.ata.temperature=auto", "strategy.ata.auto_factor=0.25"),
    "ata_1_neighbor": ("strategy.ata.neighbors=1",),
    "ata_4_neighbors": ("strategy.ata.neighbors=4",),
    "ata_8_neighbors": ("strategy.ata.neighbors=8",),
    "ata_temperature_1": ("strategy.ata.temperature=1",),
    "ata_temperature_2": ("strategy.ata.temperature=2",),
    "ata_temperature_16": ("strategy.ata.temperature=16",),
    "ata_inverse_distance": ("strategy.ata.weighting=inverse_distance",),
    "ata_share": ("strategy.ata.weighting=share",),
    "ata_product": ("strategy.ata.space=product",),
    "ata_without_self": ("strategy.ata.include_self=false",),
}
GROUPS = {"all": tuple(STRATEGIES), "ablations": tuple(f"pilot-{n}" for n in ABLATIONS),
          "ata": tuple(f"pilot-{n}" for n in ATA_SWEEP)}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A strategy with its changes to the config; `family` is the strategy whose learning rates it takes."""

    name: str
    family: str
    overrides: tuple[str, ...]


def read_variants(text: str) -> list[Variant]:
    """"a,b,…": strategies, "pilot-<ablation>", groups (all, ablations, ata), and "name+key=value+…" for anything else.

    Raises:
        InputError: a name that is not known.
    """
    out: dict[str, Variant] = {}
    for item in (name for part in text.split(",") for name in GROUPS.get(part.strip(), (part.strip(),))):
        name, *changes = item.split("+")
        family, _, ablation = name.partition("-")
        known = ABLATIONS | ATA_SWEEP
        if family not in STRATEGIES or (ablation and (family != "pilot" or ablation not in known)):
            raise InputError(f"--strategies: {name!r} is not known. Strategies: {', '.join(STRATEGIES)}; groups: "
                             f"{', '.join(GROUPS)}; ablations: {', '.join('pilot-' + n for n in known)}.")
        overrides = (f"strategy.name={family}", *known.get(ablation, ()), *changes)
        out[item] = Variant(item, family, overrides)
    return list(out.values())


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


def rate_changes(config: Config, factor: float) -> list[str]:
    return [f"train.{name}={getattr(config.train, name) * factor!r}"
            for name in ("lr_connector", "lr_lora_stage1", "lr_lora_stage2")]


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


def summarise(name: str, rows: dict[str, dict], reference: str = "pilot") -> dict[str, Any]:
    """Mean, standard error and paired difference to `reference` of one variant; see `paired`."""
    seeds = rows[name]["seeds"]
    values = np.asarray([s["score_mean"] if s["score_mean"] is not None else 0.0 for s in seeds])
    tasks = sorted({t for s in seeds for t in s["score_by_task"]})
    out = {"name": name, "score": float(values.mean()), "standard_error": standard_error(values),
           "by_task": {t: float(np.mean([s["score_by_task"].get(t, 0.0) for s in seeds])) for t in tasks},
           "base_captions": mean_score([s["base_captions"] for s in seeds if s["base_captions"] is not None]),
           "effective_neighbors": mean_score([s["effective_neighbors"][-1] for s in seeds if not s["diverged"]]),
           "quarantined": sum(s.get("quarantined", 0) for s in seeds),
           "diverged": sum(s["diverged"] for s in seeds), "wall_seconds": rows[name]["wall_seconds"],
           "bytes_up": seeds[0].get("bytes_up"), "bytes_down": seeds[0].get("bytes_down")}
    if reference in rows and name != reference:
        theirs = np.asarray([s["score_mean"] or 0.0 for s in rows[reference]["seeds"]])
        out["difference"] = paired(theirs, values)
    return out


def standard_error(values: np.ndarray) -> float | None:
    return None if len(values) < 2 else float(values.std(ddof=1) / math.sqrt(len(values)))


def paired(reference: np.ndarray, values: np.ndarray) -> dict[str, Any]:
    """reference − values, seed by seed: mean, and its 95 % confidence interval by Student's t."""
    from scipy import stats

    apart = reference - values
    error = standard_error(apart)
    if error is None:
        return {"mean": float(apart.mean()), "low": None, "high": None, "significant": None}
    half = float(stats.t.ppf(0.975, len(apart) - 1)) * error
    low, high = float(apart.mean() - half), float(apart.mean() + half)
    return {"mean": float(apart.mean()), "low": low, "high": high, "significant": low > 0 or high < 0}


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
    from pilot_jax.comparison_report import write_results

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
