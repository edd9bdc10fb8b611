"""The base class of strategies: ownership table, schedule, starting adapters, rule for local steps, aggregation.

Most strategies define only a mixing matrix (`mix`), and perhaps a local rule or a server optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pilot_jax.config import STRATEGY_PARAMS, StrategyParams
from pilot_jax.errors import InputError
from pilot_jax.federation import combining, lora_options, mixing
from pilot_jax.federation.cohort import Aggregated, Cohort
from pilot_jax.federation.defence import Defence, clip_changes
from pilot_jax.federation.halves import SKETCH, SplitHalves, empty_sketch, sketch_role
from pilot_jax.federation.phases import PLAIN_RULE, LocalRule
from pilot_jax.federation.roles import BASE_ROWS, Role, Roles, Scope, Tree, float32, num_bytes
from pilot_jax.models.lora import LORA_SUBTREES, RESIDUAL, init_lora
from pilot_jax.models.spec import VlmSpec
from pilot_jax.parallel.processes import to_host


@dataclasses.dataclass(frozen=True)
class Strategy:
    """The base of all strategies: projector and LoRA are trained as in plain LLaVA, and averaged.

    With `params.projector: frozen`, and on a language model alone, LoRA is trained without the projector.
    Pilot trains a client for one phase more than it has rounds. Baselines do the same by a second phase in round 1.
    """

    params: Any = None  # an instance of the class' `Params`; None: the defaults
    schedule: str = "first_time"
    ranks_differ: bool = False  # whether the clients' LoRA ranks differ
    layer_ranks: tuple[int, ...] = ()  # rank of LoRA in each decoder layer; (): the same in all

    Params: ClassVar[type[StrategyParams]] = StrategyParams  # the keys of the section `strategy` beside `name`
    first_stages: ClassVar[Any] = ("plain", "plain")  # stages of a client's first round
    later_stages: ClassVar[Any] = ("plain",)  # stages of its other rounds: the end of `first_stages`
    scope: ClassVar[Scope] = "shared"  # scope of projector and LoRA
    aggregated_by: ClassVar[str] = "mean"
    one_model: ClassVar[bool] = True  # whether clients begin a phase with the server's model, not their own
    answering_stage: ClassVar[str | None] = None  # stage as which models are evaluated and exported; None: their last
    pools_data: ClassVar[bool] = False  # whether there is one client, with the data of all
    restarts_lora: ClassVar[bool] = False  # whether, with `combine: exact`, LoRA starts anew after each aggregation
    needs_one_rank: ClassVar[bool] = False  # whether all clients must have LoRA of one rank
    measured: ClassVar[Any] = ("text_adapter",)  # subtrees that are measured, each by itself, if it `splits_halves`
    finetunes: ClassVar[bool] = False  # whether the run's final models are those after fine-tuning

    def __post_init__(self) -> None:
        params = self.Params() if self.params is None else self.params
        object.__setattr__(self, "params", params.model_copy(update={"name": self.name}))
        if self.params.combine not in self.combines():
            raise InputError(f"strategy.combine: {self.params.combine} does not fit {self.name}. It takes "
                             f"{', '.join(self.combines())}.")
        if self.params.clip is not None and not self.clips:
            raise InputError(f"strategy.clip: {self.name} does not take it. Set it to null, or use pilot or fedavg.")
        one_rank = self.needs_one_rank or (self.params.combine == "exact" and not self.restarts_lora)
        if self.ranks_differ and one_rank:
            raise InputError(f"model.lora.rank: the clients' ranks differ, but {self.name} needs one rank for all. "
                             "Give one, or use another strategy, such as flexlora or flora.")
        lora_options.check_layer_ranks(self.name, self.params.combine, self.layer_ranks)
        if self.finetunes and self.pools_data:
            raise InputError(f"strategy.name: {self.name} pools all data into one client, so it cannot fine-tune each "
                             "client's model. Set the class attribute finetunes or pools_data to False.")
        if self.schedule == "single" and set(self.first_stages) != set(self.later_stages):
            raise InputError(f"federation.schedule: single, but {self.name} trains "
                             f"{' and then '.join(self.first_stages)}. Set it to first_time or every_round.")

    @property
    def name(self) -> str:
        return name_of(type(self))

    @property
    def splits_halves(self) -> bool:
        """Whether clients measure the noise of their updates by halves of their data, so that a cohort has `ratio`."""
        return False

    @property
    def mixes_updates(self) -> bool:
        """Whether the clients' changes are mixed, each mixture then added to the model with which a client began."""
        return False

    @property
    def clips(self) -> bool:
        """Whether it takes `params.clip`: every upload is a change of what the server has sent."""
        return self.one_model and type(self).aggregate is Strategy.aggregate

    @property
    def defence(self) -> Defence:
        """The bounds on what one client can do to the others."""
        return Defence(self.params.clip)

    @property
    def needs_starts(self) -> bool:
        """Whether a cohort has `starts`."""
        return self.mixes_updates or self.defence.needs_starts

    def has_common_model(self) -> bool:
        """Returns whether all clients have one model after an aggregation, and no trained parts of their own."""
        own = any(row.scope == "local" and "trained" in row.modes.values() for row in self.ownership().adapter_rows)
        return self.one_model and not own

    def combines(self) -> tuple[str, ...]:
        """Returns the values of `combine` that the strategy can have.

        All others than factors need a LoRA that is shared as a whole, and no rule of the strategy's own for uploads.
        exact needs a model that is common to all, for its change of the frozen weights to be added to.
        """
        kind = type(self)
        own_rule = kind.combine is not Strategy.combine or kind.aggregate is not Strategy.aggregate
        if own_rule or self.mixes_updates or "text_adapter" not in self.roles().names(scope="shared"):
            return ("factors",)
        if self.server_optimizer() is not None:  # its moments belong to the entries of A and B
            return "factors", "aligned"
        return ("factors", "product", "aligned", "exact") if self.one_model else ("factors", "product", "aligned")

    def for_base(self, takes_images: bool) -> Strategy:
        """Returns the strategy as it runs on a base model, of which a language model alone takes no images.

        Raises:
            InputError: it trains visual adapters, and the base has no images or `params.projector` is frozen.
        """
        if takes_images and self.params.projector == "trained":
            return self
        frozen = dataclasses.replace(self, params=self.params.model_copy(update={"projector": "frozen"}))
        visual = frozen.visual_adapters()
        if visual and takes_images:
            raise InputError(f"strategy.projector: frozen, but {self.name} trains {', '.join(visual)}. Set it to "
                             f"trained, or use a strategy that can train LoRA alone: {', '.join(_text_strategies())}.")
        if visual:
            raise InputError(f"strategy.name: {self.name} trains adapters of images ({', '.join(visual)}), but "
                             "model.parts is a language model alone. Use a strategy that can train LoRA alone: "
                             f"{', '.join(_text_strategies())}.")
        return frozen

    def visual_adapters(self) -> tuple[str, ...]:
        """Returns the subtrees, other than LoRA, that the model reads in some stage, by its names for them."""
        return tuple(dict.fromkeys(
            row.name_in_model for row in self.roles().adapter_rows
            if row.name_in_model not in LORA_SUBTREES and set(row.modes.values()) & {"trained", "frozen"}))

    def stages(self, first_time: bool, round_: int) -> tuple[str, ...]:
        """Returns the stages of a client's phases in a round. A baseline's extra phase is in round 1, where all clients
        are new: in a later round, new clients alone would train it and replace the model of all others."""
        return self._stages(round_ == 1)

    def _stages(self, first: bool) -> tuple[str, ...]:
        both = self.schedule == "every_round" or (first and self.schedule == "first_time")
        return self.first_stages if both else self.later_stages

    def roles(self) -> Roles:
        """Returns the ownership table: which subtree is trained, frozen, uploaded and received in which stage."""
        return Roles((*BASE_ROWS,
                      Role("text_adapter", {"plain": "trained"}, self.scope, self.aggregated_by),
                      self.projector_role(self.scope, self.aggregated_by)))

    def ownership(self) -> Roles:
        """Returns the whole ownership table: `roles`, and the rows that options of LoRA add."""
        stages = dict.fromkeys((*self.first_stages, *self.later_stages))
        extra = lora_options.extra_rows(tuple(stages), self.params.combine == "exact", self.ranks_differ)
        sketch = [sketch_role(tuple(stages))] if self.splits_halves else []
        return Roles((*self.roles().rows, *extra, *sketch))

    def projector_role(self, scope: Scope, aggregated_by: str, stages: tuple[str, ...] = ("plain",)) -> Role:
        """Returns the projector's row of the table. If it is frozen, it is a part of the base and no adapter."""
        if self.params.projector == "frozen":
            return Role("projector", dict.fromkeys(stages, "frozen"), "base", "never")
        return Role("projector", dict.fromkeys(stages, "trained"), scope, aggregated_by)

    def initial_adapters(self, key: jax.Array, projector: Mapping[str, Tree], model: VlmSpec, rank: int,
                         num_tasks: int) -> dict[str, Tree]:
        """Returns the initial adapters, equal for all clients: else LoRA distances would measure randomness.

        `projector` is the base's; {} for a language model alone."""
        lora = init_lora(key, model.text, rank)
        adapters = {"text_adapter": lora, **self.beside_lora(key, lora)}
        return adapters if self.params.projector == "frozen" else {**adapters, "projector": float32(projector)}

    def beside_lora(self, key: jax.Array, lora: Tree) -> dict[str, Tree]:
        """Returns the subtrees that have the shapes of the LoRA `text_adapter` and lie beside it: by default none."""
        return {}

    def with_options(self, adapters: Mapping[str, Tree], rank: int) -> dict[str, Tree]:
        """Returns `initial_adapters`, whose LoRA has the given rank, and the subtrees that options of LoRA add."""
        out = dict(adapters)
        if self.params.combine == "exact":
            out[RESIDUAL] = lora_options.empty_residual(adapters["text_adapter"], self.params.residual_rank)
        if self.splits_halves:
            out[SKETCH] = empty_sketch(self.measured)
        out = lora_options.with_rank(out, rank, rank) if self.ranks_differ else out
        return {name: lora_options.of_layer_ranks(name, tree, self.layer_ranks) for name, tree in out.items()}

    def warning(self) -> str | None:
        """Returns a warning about these parameters for the user, or None."""
        return None

    def local_rule(self) -> LocalRule:
        """Returns the change that clients make to their gradients."""
        return SplitHalves(subtrees=self.measured) if self.splits_halves else PLAIN_RULE

    def server_optimizer(self) -> optax.GradientTransformation | None:
        """Returns an optimizer of the gradient (server model − mixed uploads). None: mixed uploads are the model."""
        return None

    def initial_server_state(self, adapters: Mapping[str, Tree], sizes: np.ndarray, tasks: np.ndarray,
                             ) -> dict[str, Any]:
        """Returns the first server state. `adapters`: shared and received subtrees; sizes, tasks: int [K]."""
        if not self.one_model:
            return {}
        model = {n: adapters[n] for n in self.roles().names(scope="shared") if n in adapters}
        optimizer = self.server_optimizer()
        exact = {"residual": adapters[RESIDUAL]} if RESIDUAL in adapters else {}
        if self.restarts_lora:
            exact["start"] = adapters["text_adapter"]
        return {"model": model} | exact | ({} if optimizer is None else {"optimizer": optimizer.init(model)})

    def fetch(self, adapters: dict[str, Tree], server: Mapping[str, Any], task: int) -> dict[str, Tree]:
        """Returns a client's adapters at the start of a phase: its own, with the server's current subtrees for it."""
        residual = {RESIDUAL: server["residual"]} if "residual" in server else {}
        return {**adapters, **server["model"], **residual} if self.one_model else adapters

    def parts_of(self, downloads: Mapping[str, Tree], task: int) -> dict[str, Tree]:
        """Returns subtrees that are parts of others which a client has downloaded, and so are not sent themselves."""
        return {}

    def mix(self, cohort: Cohort) -> jax.Array:
        """Returns the mixing matrix [S, S] of all shared subtrees; by default FedAvg's, with n_j/Σn in every row."""
        return mixing.mean(cohort.sizes)

    def combine(self, cohort: Cohort, weights: jax.Array) -> dict[str, Tree]:
        """Returns mixed uploads, leaves [M, …], for the rows of `weights` [M, S]. Override it for an aggregation that
        no matrix expresses. With `one_model` all rows are equal, and `weights` has the first alone.
        """
        return self._mixed(cohort, weights, tuple(cohort.uploads))

    def _mixed(self, cohort: Cohort, weights: jax.Array, names: tuple[str, ...]) -> dict[str, Tree]:
        """Returns mixtures of some subtrees, leaves [M, …]: of models or, if it `mixes_updates`, of changes."""
        uploads = {name: cohort.uploads[name] for name in names}
        if not self.mixes_updates or cohort.starts is None:
            return mixing.apply(weights, uploads)
        return mixing.apply_to_updates(weights, uploads, {name: cohort.starts[name] for name in names}, cohort.new)

    def aggregate(self, cohort: Cohort, server: Mapping[str, Any]) -> Aggregated:
        """Returns what each client of the cohort downloads, and the server's state afterwards."""
        if (clip := self.params.clip) is not None:
            cohort = dataclasses.replace(cohort, uploads=clip_changes(cohort.uploads, cohort.starts or {}, clip))
        weights, state = to_host(self.mix(cohort)), dict(server)
        rows, log = weights[:1] if self.one_model else weights, {"weights": weights}
        downloads = self.combined(cohort, rows, server)
        if self.params.combine == "exact" and "text_adapter" in downloads:
            downloads["text_adapter"], state["residual"], log["residual_lost"] = to_host(lora_options.exactly(
                cohort, rows[0], downloads["text_adapter"], server, self.restarts_lora))
        if self.one_model:
            model = to_host(jax.tree.map(lambda leaf: leaf[0], downloads))
            model, state = self._server_step(model, state)
            downloads = jax.tree.map(lambda leaf: np.broadcast_to(leaf, (len(cohort), *leaf.shape)), model)
            downloads |= {RESIDUAL: state["residual"]} if "residual" in state else {}
        return Aggregated(downloads, state, log)

    def combined(self, cohort: Cohort, weights: jax.Array, server: Mapping[str, Any]) -> dict[str, Tree]:
        """Returns `combine`, with LoRA made one as `params.combine` says; for exact, its mean, as for factors."""
        mixed = self.combine(cohort, weights)
        if self.params.combine in ("product", "aligned") and "text_adapter" in mixed:
            mixed["text_adapter"] = self.combine_lora(cohort, weights, server)
        return mixed

    def combine_lora(self, cohort: Cohort, weights: jax.Array, server: Mapping[str, Any]) -> Tree:
        """Returns the LoRAs [M, …] that `params.combine`, other than exact, makes of the uploads.

        weights: [M, S]; with `one_model` a single row.
        """
        loras = cohort.uploads["text_adapter"]
        if self.params.combine == "product":
            return combining.product(weights, loras, terms=self.most_weights(len(cohort)))
        if self.params.combine == "aligned" and cohort.round > 1:  # FedRot-LoRA's first round has no rotation
            reference = (jax.tree.map(lambda leaf: leaf[None], server["model"]["text_adapter"]) if self.one_model
                         else loras)
            return combining.aligned(weights, loras, reference, factor="a" if cohort.round % 2 else "b",
                                     strength=self.params.rotation)
        return self._mixed(cohort, weights, ("text_adapter",))["text_adapter"]

    def most_weights(self, cohort: int) -> int:
        """Returns how many weights in a row of the mixing matrix can be above 0."""
        return cohort

    def _server_step(self, mixed: dict[str, Tree], state: dict[str, Any]) -> tuple[dict[str, Tree], dict[str, Any]]:
        """Returns the server's model and state after its optimizer, if any. Its gradient is the negated mean change of
        the clients (Reddi et al., 2021). Subtrees that the phase did not upload count as unchanged."""
        optimizer, mixed = self.server_optimizer(), {**state["model"], **mixed}
        if optimizer is not None:
            pseudo_gradient = jax.tree.map(jnp.subtract, state["model"], mixed)
            steps, state["optimizer"] = optimizer.update(pseudo_gradient, state["optimizer"], state["model"])
            mixed = to_host(optax.apply_updates(jax.tree.map(jnp.asarray, state["model"]), steps))
        state["model"] = mixed
        return mixed, state

    def sent_bytes(self, adapters: Mapping[str, Tree]) -> tuple[dict[str, int], dict[str, int]]:
        """Returns the bytes of each subtree that one client (uploads, downloads) in a phase, as float32, if the phase
        changes all shared subtrees."""
        up = {name: num_bytes(tree) for name, tree in self.roles().select(adapters, "shared").items()}
        return up, dict(up)

    def phase_bytes(self, adapters: Mapping[str, Tree], stage: str) -> tuple[dict[str, int], dict[str, int]]:
        """Returns `sent_bytes` without the shared subtrees that a phase of `stage` does not change."""
        still = set(self.roles().names(scope="shared")) - set(self.roles().uploaded(stage))
        up, down = self.sent_bytes(adapters)
        return {n: b for n, b in up.items() if n not in still}, {n: b for n, b in down.items() if n not in still}

    def traffic(self, adapters: Mapping[str, Tree], stage: str | None = None, rank: int = 1, largest: int = 1,
                ) -> tuple[dict[str, int], dict[str, int]]:
        """Returns `phase_bytes` of a stage, or `sent_bytes`, with what options of LoRA change: a client's rank below
        the largest, of which its arrays are, and a change of the frozen weights that is downloaded."""
        up, down = self.sent_bytes(adapters) if stage is None else self.phase_bytes(adapters, stage)
        extra = {RESIDUAL: num_bytes(adapters[RESIDUAL])} if RESIDUAL in adapters else {}
        sketch = {SKETCH: num_bytes(adapters[SKETCH])} if SKETCH in adapters else {}
        share = lora_options.rank_share(rank, largest, self.layer_ranks)
        return lora_options.traffic({**up, **sketch}, share), lora_options.traffic({**down, **extra}, share)


def _text_strategies() -> list[str]:
    """Returns the names of the package's strategies that can train LoRA alone."""
    return [name for name, kind in STRATEGIES.items()
            if kind.__module__.startswith("pilot_jax.") and set(kind().visual_adapters()) <= {"projector"}]


STRATEGIES: dict[str, type[Strategy]] = {}
_Class = TypeVar("_Class", bound=type[Strategy])


def name_of(strategy: type[Strategy]) -> str:
    """Returns the name under which a class is registered, or else "module:Class"."""
    known = next((name for name, other in STRATEGIES.items() if other is strategy), None)
    return known or f"{strategy.__module__}:{strategy.__qualname__}"


def register(name: str = "") -> Callable[[_Class], _Class]:
    """Returns a class decorator that registers a strategy for `strategy.name: NAME` (default: "module:Class")."""
    def add(strategy: _Class) -> _Class:
        key = name or name_of(strategy)
        STRATEGIES[key], STRATEGY_PARAMS[key] = strategy, strategy.Params
        return strategy

    return add
