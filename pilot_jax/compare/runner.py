"""Runs a comparison: several variants with several seeds on the same base model, data, steps and batches.

All seeds of a variant (and all learning rates, when they are tuned) are trained together, as more clients of the same
program. Each variant's results are written as soon as it ends, so that a second call runs only what is missing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from pilot_jax.compare.differences import check_references, differences
from pilot_jax.compare.finished import Record, once
from pilot_jax.compare.page import write_results
from pilot_jax.compare.progress import VariantProgress
from pilot_jax.compare.statistics import best_factor, beyond, edge_warnings, summarise
from pilot_jax.compare.together import captions_of_all, finetune_all, run_all, scores_of_all
from pilot_jax.compare.variants import Variant
from pilot_jax.config import Config, apply_overrides
from pilot_jax.data.arrays import ClientData, Prompts, aligned
from pilot_jax.data.guesses import GUESSES
from pilot_jax.errors import InputError
from pilot_jax.evaluation.finetune import Finetuned, after_finetuning
from pilot_jax.evaluation.personalised import (
    base_prompts,
    evaluate_together,
    forgetting,
    mean_score,
    score_by_task,
)
from pilot_jax.evaluation.scores import Scores, guessed_scores, score_record
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.state import State
from pilot_jax.files import path_part
from pilot_jax.models.pretrained import PretrainedModel
from pilot_jax.planning.server import server_costs
from pilot_jax.runs.events import CompileClock, MetricsFile
from pilot_jax.runs.prepare import (
    Setup,
    load_samples,
    prepare,
    rate_changes,
    seeded,
    with_overrides,
    with_strategy,
)
from pilot_jax.words import counted

TUNING_SEED = 1000  # added to the config's seeds for tuning, so that no compared seed is tuned on


@dataclasses.dataclass(frozen=True)
class Field:
    """The data and models that all variants share: one setup per seed, with data padded to common shapes."""

    setups: tuple[Setup, ...]
    base_prompts: tuple[Prompts, ...]  # by seed; empty if the base model is not the embedded one


def make_field(config: Config, seeds: Sequence[int], base_samples: int = 0) -> Field:
    """Prepares the field of several seeds, each of which is added to the config's seeds.

    Args:
        base_samples: number of prompts of the embedded base model's pretraining task that every model answers, which
            shows how much of that task it has forgotten.
    """
    separate = [prepare(seeded(config, seed)) for seed in seeds]
    groups, model = aligned([setup.evaluation.clients for setup in separate]), separate[0].federation.model
    setups = tuple(_with_data(setup, group, model) for setup, group in zip(separate, groups, strict=True))
    embedded = base_samples > 0 and setups[0].evaluation.embedded_base
    return Field(setups, tuple(base_prompts(s.evaluation, base_samples) for s in setups) if embedded else ())


def _with_data(setup: Setup, clients: Sequence[ClientData], model: PretrainedModel) -> Setup:
    """Returns the setup with the given client data, and with the model object that all setups share."""
    fed = dataclasses.replace(setup.federation, model=model)
    evaluation = dataclasses.replace(setup.evaluation, clients=tuple(clients))
    return with_strategy(dataclasses.replace(setup, federation=fed, evaluation=evaluation), fed.strategy)


def setups_of(field: Field, variant: Variant, changes: Sequence[str]) -> list[Setup]:
    """Returns the field's setups with a variant's strategy and config changes."""
    return [with_overrides(setup, [*variant.overrides, *changes]) for setup in field.setups]


def tune(field: Field, variant: Variant, factors: Sequence[float], config: Config,
         progress: VariantProgress | None = None) -> Record:
    """Trains a variant with each factor on the config's learning rates, all together.

    Returns the mean validation score of each factor, and the best factor."""
    progress = progress or VariantProgress(None)
    setups, factor_of = list[Setup](), list[float]()
    for factor in factors:
        setups += setups_of(field, variant, rate_changes(config, factor))
        factor_of += [factor] * len(field.setups)
    with progress.training(f"tuning {variant.name}", [setup.federation for setup in setups]):
        states, tuned = run_all(setups, progress=progress), list[Finetuned | None]([None] * len(setups))
        if setups[0].federation.strategy.finetunes:
            tuned = finetune_all(setups, states, [RunObserver() for _ in setups], progress)
        progress.scoring()
        found = scores_of_all(setups, states, tuned, "validation")
    total = dict.fromkeys(factors, 0.0)  # a seed that diverged adds 0
    for factor, scores in zip(factor_of, found, strict=True):
        total[factor] += mean_score(list(scores.own.values())) or 0.0
    score = {f"{factor:g}": value / len(field.setups) for factor, value in total.items()}
    return {"factor": best_factor(score), "validation": score}


def run_variant(field: Field, variant: Variant, changes: Sequence[str] = (), split: str = "test",
                progress: VariantProgress | None = None) -> Record:
    """Trains and scores one variant with all seeds; returns its results as a JSON object."""
    progress = progress or VariantProgress(None)
    began, clock = time.perf_counter(), CompileClock()
    setups = setups_of(field, variant, changes)
    logs = [MetricsFile(None) for _ in setups]
    with progress.training(variant.name, [setup.federation for setup in setups]):
        states = run_all(setups, logs, progress)
        tuned = finetune_all(setups, states, logs, progress)
        trained, train_compile = time.perf_counter() - began, clock.seconds
        progress.scoring()
        scores = scores_of_all(setups, states, tuned, split)
        ended = [None if state is None else after_finetuning(setup.federation, state, done)
                 for setup, state, done in zip(setups, states, tuned, strict=True)]
        captions = captions_of_all(setups, ended, field.base_prompts)
    clock.stop()
    seeds = [_seed_record(*one) for one in zip(
        setups, ended, scores, captions, [log.records for log in logs], strict=True)]
    return {"name": variant.name, "overrides": [*variant.overrides, *changes], "seeds": seeds,
            "wall_seconds": time.perf_counter() - began, "train_seconds": trained, "compile_seconds": clock.seconds,
            "train_compile_seconds": train_compile}


def _seed_record(setup: Setup, state: State | None, scores: Scores, captions: Sequence[float],
                 records: Sequence[Record]) -> Record:
    """Returns the results of one seed; `state` is that at its end, None if it diverged."""
    record: Record = {"seed": setup.federation.seed, "diverged": state is None,
                      **score_record(setup.evaluation, scores), "base_captions": mean_score(captions)}
    if not scores.own:
        record["score_by_task"] = {}
    if state is None:
        return record
    neighbors = [round(r["effective_neighbors"], 3) for r in records if "effective_neighbors" in r]
    fed = setup.federation
    cohort = min(fed.settings.clients_per_round or len(fed.clients), len(fed.clients))
    server = server_costs(fed.strategy, state.population[0].adapters, cohort)
    return record | {"bytes_up": state.bytes_up, "bytes_down": state.bytes_down, "client_steps": state.client_steps,
                     "quarantined": state.quarantined, "effective_neighbors": neighbors, "server": server}


def _score_base(field: Field, split: str) -> Record:
    """Returns the base model's mean scores on the clients' data and on its pretraining captions."""
    evaluations, nobody = [setup.evaluation for setup in field.setups], [None] * len(field.setups)
    values = evaluate_together(evaluations, nobody, split)
    captions = forgetting(evaluations, nobody, field.base_prompts) if field.base_prompts else []
    return {"score": mean_score([x for v in values for x in v.values()]),
            "base_captions": mean_score([x for v in captions for x in v])}


def _score_guesses(field: Field, split: str) -> Record:
    """Returns the mean scores over seeds of each kind of guess in `data.guesses.guesses`."""
    scores = [(s.evaluation, guessed_scores(load_samples(s.config), s.eval.metrics, split)) for s in field.setups]

    def means(way: str) -> Record:
        by_task = [score_by_task(evaluation, found[way]) for evaluation, found in scores]
        return {"score": mean_score([x for _, found in scores for x in found[way].values()]),
                "by_task": {t: mean_score([x for one in by_task if (x := one[t]) is not None]) for t in by_task[0]}}

    return {way: means(way) for way in GUESSES}


@dataclasses.dataclass(frozen=True)
class Options:
    """How variants are compared."""

    seeds: int  # number of seeds
    # Factors on the config's learning rates. Each strategy gets the one with the best validation score on data of a
    # separate seed, and ablations get Pilot's. Without factors, all have the config's learning rates.
    factors: tuple[float, ...] = ()
    split: str = "test"  # split that is scored; "validation" if the comparison decides about settings
    base_samples: int = 16  # see `make_field`
    margin: float = 0.02  # see `differences`
    against: tuple[str, ...] = ()  # see `references`


FURTHER = 3  # factors on the learning rates that a strategy may try beyond those of the options


class Comparison:
    """A running comparison. Finished results are read from files, and data are prepared only if some are missing."""

    def __init__(self, config: Config, options: Options, out: Path, say: Callable[[str], None]) -> None:
        self.config, self.options, self.out, self.say = config, options, out, say
        self.progress = VariantProgress(say)
        self._fields: dict[str, Field] = {}

    def _field(self, kind: str) -> Field:
        """Returns the field "tune" (the tuning seed) or "compare" (all other seeds); only the last one is in memory."""
        if kind not in self._fields:
            seeds, samples = list(range(self.options.seeds)), self.options.base_samples
            self.say(f"preparing the data of {'the tuning seed' if kind == 'tune' else counted(len(seeds), 'seed')} …")
            self._fields.clear()
            self._fields[kind] = (make_field(self.config, [TUNING_SEED]) if kind == "tune"
                                  else make_field(self.config, seeds, samples))
            split = "validation" if kind == "tune" else self.options.split
            if not any(split in c.evaluation for c in self._fields[kind].setups[0].evaluation.clients):
                raise InputError(f"data.path: no client has {split} samples, on which scores could be compared. Name "
                                 f"the split of samples, or set data.hold_out.{split}, such as 0.1.")
        return self._fields[kind]

    def _once(self, name: str, given: Sequence[object], make: Callable[[], Record]) -> tuple[Record, bool]:
        return once(self.out / f"{name}.json", [self.config.model_dump(mode="json"), *given], make)

    def _once_for_all(self, name: str, given: Sequence[object], make: Callable[[], Record]) -> Record:
        """Returns a record for which no training matters: it holds for all strategies, rates and numbers of rounds."""
        config = self.config.model_dump(mode="json", exclude={"strategy", "train"})
        config["federation"] = {"clients": config["federation"]["clients"]}  # among whom the data are divided
        return once(self.out / f"{name}.json", [config, *given], make)[0]

    def rates(self, family: str) -> Record:
        """Returns the result of `tune` for a strategy, with its best factor on the learning rates.

        As long as that is the largest or the smallest of those tried, up to FURTHER more are, each beyond the last.
        """
        done, new = self._tuned(family, self.options.factors)
        for _ in range(FURTHER):
            if (further := beyond(done["validation"])) is None:
                break
            more, newer = self._tuned(family, (further,))
            validation, new = done["validation"] | more["validation"], new or newer
            done = {"factor": best_factor(validation), "validation": validation,
                    "wall_seconds": done["wall_seconds"] + more["wall_seconds"]}
        if new:
            scores = ", ".join(f"× {factor}: {score:.3f}" for factor, score in done["validation"].items())
            self.say(f"{family}: learning rates × {done['factor']:g}; validation scores {scores} "
                     f"({done['wall_seconds']:.0f} s)")
        return done

    def _tuned(self, family: str, factors: Sequence[float]) -> tuple[Record, bool]:
        """Returns (result of `tune` for a strategy, whether it is new)."""
        variant = Variant(family, family, (f"strategy.name={family}",))

        def make() -> Record:
            clock = time.perf_counter()
            tuned = tune(self._field("tune"), variant, factors, self.config, self.progress)
            return tuned | {"wall_seconds": time.perf_counter() - clock}

        beside = "" if factors == self.options.factors else f"_{factors[0]:g}"
        given = [dataclasses.astuple(variant), factors, TUNING_SEED]
        return self._once(f"rates/{path_part(family + beside)}", given, make)

    def variant(self, variant: Variant, factor: float) -> Record:
        """Returns the results of a variant whose learning rates are the config's times `factor`."""
        changes, split = rate_changes(self.config, factor) if factor != 1 else [], self.options.split
        done, _ = self._once(
            f"variants/{path_part(variant.name)}",
            [dataclasses.astuple(variant), changes, split, self.options.seeds, self.options.base_samples],
            lambda: {"rate_factor": factor} | run_variant(self._field("compare"), variant, changes, split,
                                                          self.progress))
        return done

    def base(self) -> Record:
        """Returns the scores of the base model without training."""
        given = ["base", self.options.split, self.options.seeds, self.options.base_samples]
        return self._once_for_all("base", given, lambda: _score_base(self._field("compare"), self.options.split))

    def guesses(self) -> Record:
        """Returns the scores of answers that look at no picture and ask no model."""
        given = ["guesses", self.options.split, self.options.seeds]
        return self._once_for_all("guesses", given, lambda: _score_guesses(self._field("compare"), self.options.split))

    def rows(self, variants: Sequence[Variant], rates: dict[str, Record]) -> dict[str, Record]:
        """Returns the results of every variant, by name, and reports each score as soon as it is known."""
        rows: dict[str, Record] = {}
        for number, variant in enumerate(variants, 1):
            done = rows[variant.name] = self.variant(variant, rates.get(variant.family, {}).get("factor", 1.0))
            line = summarise(variant.name, done)
            error = "" if line["standard_error"] is None else f" ± {line['standard_error']:.3f}"
            self.say(f"[{number}/{len(variants)}] {variant.name}: {line['score']:.3f}{error} "
                     f"({done['wall_seconds']:.0f} s)")
        return rows

    def results(self, rows: dict[str, Record], rates: dict[str, Record]) -> Record:
        """Returns all that is known of the comparison, from the results of every variant and of tuning, by name."""
        options = self.options
        apart = differences(rows, options.against, options.margin)
        tried = (float(factor) for rate in rates.values() for factor in rate["validation"])
        return {
            "config": self.config.model_dump(mode="json"), "split": options.split, "seeds": options.seeds,
            "factors": sorted({*options.factors, *tried}), "base": self.base(), "guesses": self.guesses(),
            "device": jax.devices()[0].device_kind, "devices": jax.device_count(), "rates": rates,
            "margin": options.margin, "warnings": edge_warnings(rates),
            "variants": [summarise(name, row) | {"rate_factor": row["rate_factor"], "differences": apart[name]}
                         for name, row in rows.items()],
            "rows": rows, "seconds_of_all": sum(r["wall_seconds"] for r in rows.values()),
            "seconds_of_tuning": sum(r["wall_seconds"] for r in rates.values())}


def compare(config: Config, variants: Sequence[Variant], options: Options, out: Path,
            say: Callable[[str], None] = print) -> Record:
    """Runs the missing variants, writes `results.json`, `results.md` and a figure into `out`; returns the results."""
    began, comparison = time.perf_counter(), Comparison(config, options, out, say)
    check_references(options.against, [variant.name for variant in variants])
    for variant in variants:
        apply_overrides(config, list(variant.overrides))  # a mistake in the last variant is reported before the first
    families = dict.fromkeys(v.family for v in variants) if options.factors else {}
    rates = {family: comparison.rates(family) for family in families}
    rows = comparison.rows(variants, rates)
    results = comparison.results(rows, rates) | {"seconds_of_this_call": time.perf_counter() - began}
    for warning in results["warnings"]:
        say(f"Warning: {warning}")
    write_results(results, out)
    return results
