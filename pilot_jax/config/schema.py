"""The schema of a config: every key with its type, default, bounds and description.

The section `data` is in sections.py, `model` in model.py, `train` in training.py."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, SerializeAsAny, field_validator, model_validator

from pilot_jax.config.lora import Combine, combine_field
from pilot_jax.config.model import ModelConfig
from pilot_jax.config.sections import DataConfig, Section, made
from pilot_jax.config.training import TrainConfig


class ParticipationEntry(Section):
    """One round and the clients that take part in it."""

    round: int = Field(ge=1, le=10**6, description="Number of the round, from 1.")
    clients: list[str] = Field(description="Names of the clients that take part in this round.")


class StragglersConfig(Section):
    """Slow clients, which do not finish their local training in time."""

    share: float = Field(0.0, ge=0, le=1, description="Probability that a client of the cohort is slow in a round.")
    steps: float = Field(0.5, gt=0, le=1, description="Share of its steps that a slow client takes in each phase, at "
                         "least one step. Its learning rate follows the schedule of the shorter phase.")


class PrivacyConfig(Section):
    """Differential privacy of each client's uploads, against the server too. It is off unless `clip` is set."""

    clip: float | None = Field(None, gt=0, description="Clipping norm C: the largest L2 norm by which an upload may "
                               "differ from the adapters that the client started the phase with. null: uploads are "
                               "neither clipped nor noised.")
    noise_multiplier: float | None = Field(None, gt=0, description="Noise multiplier z: Gaussian noise of standard "
                                           "deviation 2·z·C is added to every entry of an upload. With `clip`, give "
                                           "either this or `epsilon`.")
    epsilon: float | None = Field(None, gt=0, description="Privacy loss ε that all uploads of a client in the run may "
                                  "cost together; z is computed from it. With `clip`, give either this or "
                                  "`noise_multiplier`.")
    delta: float = Field(1e-5, gt=0, lt=1, description="Probability δ of (ε, δ)-differential privacy.")
    seed: int | None = Field(None, ge=0, le=2**63 - 1, description="Seed of the noise, for runs that must repeat: who "
                             "knows it can subtract the noise. null: the operating system's random numbers.")

    @model_validator(mode="after")
    def _complete(self) -> PrivacyConfig:
        given = (self.noise_multiplier is not None) + (self.epsilon is not None)
        if (self.clip is not None) != (given == 1) or given > 1:
            raise ValueError("give clip and one of noise_multiplier and epsilon, or none of the three")
        return self


class FederationConfig(Section):
    """Clients, rounds, participation, and what the server does with bad uploads."""

    clients: int | None = Field(
        None, ge=1, description="Number K of clients, a multiple of the number of tasks, that `data.partition: equal` "
        "and `dirichlet` need. With `data.partition: given` the data determine it, and a number given here must agree.")
    rounds: int = Field(3, ge=1, le=1_000_000, description="Number of rounds.")
    clients_per_round: int | None = Field(
        None, ge=1, description="Number S of clients that are sampled for each round with `participation: uniform`. "
        "null: all clients that have joined.")
    participation: Literal["uniform"] | list[ParticipationEntry] = Field(
        "uniform", description="Choice of each round's clients. uniform: a uniform random sample without replacement. "
        "A list of {round, clients}: the named clients in the listed rounds, all that have joined in the others.")
    joins: dict[str, int] = Field({}, description="Newcomers, as {client: round}: the first round, from 1, in which "
                                  "the client can take part. All other clients can from round 1 on.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Probability that a client of the cohort drops out of a round, "
                           "after sampling and before training. At least one client always stays.")
    stragglers: StragglersConfig = StragglersConfig()
    on_bad_client: Literal["quarantine", "stop"] = Field(
        "quarantine", description="Reaction to a bad upload: one that is not finite, has another shape than expected, "
        "or exceeds `max_update_ratio`. quarantine: it is left out of the aggregation, and the client goes on from the "
        "adapters it had before the phase. stop: the run ends with an error.")
    privacy: PrivacyConfig = PrivacyConfig()
    max_update_ratio: float | None = Field(
        100.0, gt=1, description="Largest ratio of the L2 norm of a client's update to the median norm of the phase's "
        "updates and of the latest accepted ones of the same stage. A larger update is a bad upload. null: no limit.")
    local_epochs: int = Field(
        1, ge=1, le=100_000, description="Number E of passes over a client's training samples in a phase.")
    local_steps: int | None = Field(
        None, ge=1, le=10**7, description="Number of a client's steps in a phase, instead of `local_epochs`. null: the "
        "steps of `local_epochs` passes.")
    finetune_steps: int | None = Field(
        None, ge=1, le=10**7, description="Number of further steps that every client takes on its own data after the "
        "last round, from the adapters that it has then. The fine-tuned models are scored beside the others and then "
        "dropped, except under the strategy fedavg_ft. null: no fine-tuning; under fedavg_ft, the steps of a phase.")
    finetune_rate: float = Field(
        1.0, gt=0, le=1_000, description="Factor on all learning rates in fine-tuning. An average of many clients may "
        "want higher rates in its rounds than a single client does afterwards.")
    schedule: Literal["first_time", "every_round", "single"] = Field(
        "first_time", description="Rounds in which a client trains stage 1 before stage 2. first_time: its first "
        "round. every_round: all. Strategies without stages train a second phase in round 1, or in every round. "
        "single: every round is one phase, as in papers on FedAvg; strategies with two stages refuse it.")


class StrategyParams(Section):
    """The section `strategy`: the name of a strategy, and that strategy's own keys, which its own file adds."""

    name: str = Field("pilot", description="Name of the strategy, which determines what clients train, upload and "
                      "receive: one of the package's strategies, or `module:Class` for one of your own.")
    projector: Literal["trained", "frozen"] = Field(
        "trained", description="Treatment of the base's projector by strategies that train LoRA and the projector. "
        "trained: it is trained and shared. frozen: it stays the base's, and LoRA alone is trained and uploaded, as "
        "always with a language model alone, which has no projector. Pilot, whose visual adapters start from the "
        "projector, refuses frozen.")
    combine: Combine = combine_field("factors")
    clip: float | None = Field(
        None, gt=0, description="Largest L2 norm of a client's change of a shared subtree, as a multiple of the "
        "cohort's median norm. Strategies with one model for all shorten longer changes to it. Pilot does so with ψ_t; "
        "in its mixtures of LoRA, and in those of split_half, another client's difference from the own upload is "
        "shortened to this multiple of the subtree's median change. null: no limit.")
    residual_rank: int | None = Field(
        None, ge=1, description="Largest rank of the change of the frozen weights with `combine: exact`. null: that of "
        "the weights, so that nothing is lost; the change then takes up to twice their memory.")
    rotation: float = Field(1.0, gt=0, le=1, description="Strength λ of the rotation with `combine: aligned`. Below 1, "
                            "each pair is rotated only a part of the way to its reference.")


# The class of each strategy's section, by the strategy's name; the files of `federation/strategies/` fill it.
STRATEGY_PARAMS: dict[str, type[StrategyParams]] = {}


def strategies() -> ModuleType:
    """Returns the package of strategies, whose import fills `STRATEGY_PARAMS`.

    It is imported by name, because it lies in a layer above this one.
    """
    return importlib.import_module("pilot_jax.federation.strategies")


def _default_strategy() -> StrategyParams:
    strategies()
    return STRATEGY_PARAMS[StrategyParams.model_fields["name"].default]()


class EvalConfig(Section):
    """Answering the held-out data, and scoring the answers."""

    every: int = Field(
        0, ge=0, le=10**6, description="Number of rounds from one scoring of the validation split to the next. 0: it "
        "is never scored. The test split is scored once, after the last round.")
    keep: Literal["last", "best"] = Field(
        "last", description="Round whose models the run ends with, scores on the test split and saves. last: the last "
        "one. best: the one with the highest mean score on the validation split, the first of equal ones; it needs "
        "`every`. `compare` does not read this key.")
    scoring: Literal["generate", "teacher_forced"] = Field(
        "generate", description="Way in which answers are scored. generate: answers are decoded, and scored as texts "
        "by `metrics`. teacher_forced: nothing is decoded. In one forward pass on the prompt and its reference answer, "
        "a sample scores 1 if every token of the answer, its end token included, is the model's most probable one "
        "after the tokens before it, and 0 otherwise; of several references, the best counts. Greedy decoding would "
        "then give that answer, token by token. It needs `temperature: 0` and the metric exact for every task, and "
        "does not read `max_new_tokens`.")
    batch_size: int = Field(16, ge=1, le=65_536, description="Number of prompts of a client that are answered at once.")
    max_new_tokens: int = Field(32, ge=1, le=8_192, description="Largest number of tokens of an answer.")
    temperature: float = Field(0.0, ge=0, description="Temperature of sampling. 0: greedy decoding.")
    top_p: float = Field(1.0, gt=0, le=1, description="Probability p of nucleus sampling: a token is drawn from the "
                         "fewest most probable tokens whose probabilities add up to p. 1: from all tokens.")
    metrics: dict[str, Literal["exact", "iou", "vqa", "anls", "rouge_l", "bleu", "cider"] | str] = Field(
        {"grounding": "iou"}, description="Metrics, as {task: metric}; a task that is not named has exact. exact: "
        "equal up to case and white space. iou: boxes with IoU of at least 0.5. vqa: VQA accuracy against ten "
        "annotators. anls: edit similarity, for OCR. rouge_l, bleu, cider: for captions, with the extra `scores`. Each "
        "is from 0 to 1, cider from 0 to 10. Or the name of a metric of your own, which `pilot_jax.metric` registers.")

    @model_validator(mode="after")
    def _the_best_is_known(self) -> EvalConfig:
        if self.keep == "best" and not self.every:
            raise ValueError("keep: best needs scores on the validation split: set every to 1, or keep to last")
        return self

    @model_validator(mode="after")
    def _nothing_is_sampled(self) -> EvalConfig:
        if self.scoring == "teacher_forced" and self.temperature > 0:
            raise ValueError("scoring: teacher_forced scores what greedy decoding would answer: set temperature to 0, "
                             "or scoring to generate")
        return self


class MeshConfig(Section):
    """The device mesh: the sizes of its three axes, whose product is the number of devices."""

    clients: int = Field(
        1, ge=1, le=65_536, description="Number of devices along the axis that divides the clients trained at once.")
    fsdp: int = Field(
        1, ge=1, le=65_536, description="Number of devices along the axis that divides the frozen weights, which are "
        "gathered layer by layer when they are needed.")
    tensor: int = Field(
        1, ge=1, le=65_536, description="Number of devices along the axis that divides attention heads and the inner "
        "width of the MLPs.")

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return self.clients * self.fsdp * self.tensor


class SystemConfig(Section):
    """Seed, devices, memory and files. Apart from the seed, these keys change results by rounding errors only."""

    seed: int = Field(
        0, ge=0, le=2**31 - 1, description="Seed of everything random in a run: initial adapters, partition, sampling "
        "of clients, batches and sampled answers. The noise of `federation.privacy`, the digit scenes and the "
        "emoji have seeds of their own.")
    client_chunk: Annotated[int, Field(ge=1, le=65_536)] | Literal["auto"] = Field(
        3, description="Number of clients trained at once on each device, or on each row of a mesh along its axis "
        "`clients`. auto: as many as fit the device, by `plan`, and at most 16.")
    deterministic: bool = Field(False, description="Whether NVIDIA GPUs compute with the same algorithms in every run, "
                                "which is slower. CPU and TPU repeat a run bit for bit without it.")
    steps_at_once: int | None = Field(
        None, ge=1, description="Number of steps whose samples are on the devices at once, for clients whose data do "
        "not fit there. null: all steps of a phase.")
    client_devices: int | None = Field(
        None, ge=1, description="Number of devices that train clients side by side, each with a copy of the base. "
        "null: on CPU one per core, if the base is smaller than 0.5 GB and JAX has not started before; otherwise 1.")
    length_spread: float = Field(
        1.2, ge=1, description="Largest ratio between the longest samples of clients that share a compiled program. A "
        "smaller ratio means less padding and more programs to compile.")
    mesh: MeshConfig = Field(MeshConfig(), description="Mesh of devices. With all sizes 1, `client_devices` applies.")
    store: str | None = Field(
        None, description="Folder for clients' adapters, tokens and image features, for populations that do not fit in "
        "memory. An image then passes the vision tower when its client is first sampled. The run removes its files "
        "there when it ends. null: all in memory.")
    unroll: int = Field(
        4, ge=1, le=1_024, description="Number of decoder layers in one step of the loop over layers. More is faster "
        "on CPU and takes longer to compile. If it is at least the number of layers, training computes the last layer "
        "at the answers' positions alone.")
    attention: Literal["own", "cudnn", "auto"] = Field(
        "own", description="Implementation of the decoder's attention in training. own: this package's. cudnn: "
        "cuDNN's, which stores no attention scores, on NVIDIA GPUs and in bfloat16 only. Its speed is not measured. "
        "auto: cudnn where it can train the model, else own.")
    save_every: Literal["phase", "round", "never"] = Field(
        "phase", description="Occasion on which a run saves a snapshot, from which `--resume` continues it: after "
        "every phase, after every round, or never.")
    keep_saved: int = Field(
        2, ge=1, le=1_000, description="Number of latest snapshots that stay usable: if the newest is damaged, "
        "`--resume` takes the one before.")
    tensorboard: bool = Field(False, description="Whether losses and scores are also written as TensorBoard files into "
                              "the run directory, which needs the extra `tensorboard`.")
    wandb: str | None = Field(
        None, min_length=1, description="Project of Weights & Biases to which losses and scores are also sent, which "
        "needs the extra `wandb`. Its environment variables, as WANDB_MODE=offline, apply. null: none.")
    mlflow: str | None = Field(
        None, min_length=1, description="Experiment of MLflow to which losses and scores are also sent, which needs "
        "the extra `mlflow`. MLFLOW_TRACKING_URI says where it is. null: none.")
    cache: str | None = Field(
        "auto", description="Folder in which compiled programs, generated samples, token ids and image features are "
        "kept for later runs, of any config. auto: the user's cache folder. null: nothing is kept.")
    compilation_cache: str | None = Field(
        None, description="Folder of JAX's own cache of compiled programs, which several processes or machines can "
        "share. null: none; one process needs none beside `cache`.")

    @property
    def chunk(self) -> int:
        """The number of clients trained at once."""
        return int(made("system.client_chunk", self.client_chunk))

    @property
    def kernel(self) -> Literal["own", "cudnn"]:
        """The implementation of attention."""
        return made("system.attention", self.attention)

    @model_validator(mode="after")
    def _whole_on_a_device(self) -> SystemConfig:
        if self.attention == "cudnn" and self.mesh.fsdp * self.mesh.tensor > 1:
            raise ValueError("attention: cudnn needs a base that is whole on each device: set mesh.fsdp and "
                             "mesh.tensor to 1")
        return self


class Config(Section):
    """A whole configuration: all sections of a config file."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    federation: FederationConfig = FederationConfig()
    strategy: SerializeAsAny[StrategyParams] = Field(default_factory=_default_strategy)
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    system: SystemConfig = SystemConfig()

    @field_validator("strategy", mode="before")
    @classmethod
    def _strategy_by_name(cls, value: Any) -> Any:
        """Returns the keys of a section as an object of the class that their `name` chooses."""
        if not isinstance(value, dict):
            return value
        name = value.get("name", StrategyParams.model_fields["name"].default)
        return strategies().params_of(name).model_validate(value | {"name": name})

    def to_yaml(self) -> str:
        """Returns the config as YAML, with every key and its value."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
