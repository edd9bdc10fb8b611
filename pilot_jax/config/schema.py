"""The schema: every key of a config with its default, unit and bounds."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class LoraConfig(Section):
    rank: int = Field(8, ge=1, description="R; the paper: 64 at 7B")
    alpha: float = Field(16.0, gt=0, description="the update is (alpha / rank)·BA; the paper: 128")


class PartsConfig(Section):
    """A tower, a language model and a projector that were never saved as one LLaVA model, as the paper starts from."""

    vision: str = Field(description="directory of a CLIP or SigLIP model")
    language: str = Field(description="directory of a Llama, Vicuna, Mistral or Qwen2 model, with its tokenizer")
    projector: str = Field(description="mm_projector weights: .safetensors, or .bin where torch is installed")
    feature_layer: int | list[int] = Field(-2, description="hidden state(s) of the tower that are H_v; LLaVA: -2")
    feature_select: Literal["auto", "default", "full"] = Field(
        "auto", description="default drops the first token; auto: default for CLIP, full for SigLIP, which has no CLS")


class ModelConfig(Section):
    path: str = Field("embedded", description="Hugging Face LLaVA directory, or 'embedded' for the shipped base")
    parts: PartsConfig | None = Field(None, description="instead of path: separate tower, language model, projector")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: float32 on CPU, else bfloat16")
    remat: bool = Field(False, description="recompute activations in the backward pass: less memory, more time")
    lora: LoraConfig = LoraConfig()

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.parts is not None and self.path != "embedded":
            raise ValueError("give either path or parts, not both")
        return self


class DigitsConfig(Section):
    scenario: Literal["a", "b"] = Field("a", description="a: 3 tasks × 3 clients; b: 4 tasks × 5, uneven sizes")
    clients_per_task: int | None = Field(None, ge=1, description="default: the scenario's; looks and wordings repeat "
                                         "after five")
    heterogeneity: float = Field(1.0, ge=0, le=1, description="how far a task's clients differ in look and wording: "
                                 "0 not at all, 1 each has its own")
    train: int = Field(480, ge=1, description="training samples of a (full-size) client")
    validation: int = Field(16, ge=1, description="validation samples per client")
    test: int = Field(48, ge=1, description="test samples per client")
    seed: int = Field(0, ge=0, description="of the scenes; the handwriting pools are fixed")


class LimitsConfig(Section):
    """What data may ask of this machine: they are not trusted."""

    image_pixels: int = Field(100_000_000, ge=1, le=178_956_970, description="of one image, before it is decoded; "
                              "the bound is Pillow's own")
    file_bytes: int = Field(4_000_000_000, ge=1, description="of one JSON file, which is read at once; JSONL is not")
    text_characters: int = Field(1_000_000, ge=1, description="of one turn of a conversation")
    follow_links: bool = Field(False, description="whether links may lead out of the image root")


class DataConfig(Section):
    path: str = Field("digits", description="LLaVA JSON/JSONL file or folder; 'digits' for the embedded scenes")
    image_root: str | None = Field(None, description="folder that `image` is relative to; default: images/ beside path")
    file_names: Literal["task", "client"] = Field(
        "task", description="what a file's name says where its samples do not: their task, or their client")
    template: str = Field("vicuna_v1", description="conversation template: vicuna_v1 (the paper's) | vicuna_short | "
                          "llama2 | chatml | plain | tokenizer (its own chat template)")
    image_fit: Literal["processor", "pad"] = Field(
        "processor", description="pad: to a square with the mean colour first, as LLaVA-1.5 trains")
    partition: Literal["given", "equal", "dirichlet"] = Field(
        "given", description="given: the samples' `client`; equal, dirichlet: split each task's samples among clients")
    dirichlet_alpha: float = Field(1.0, gt=0, description="smaller is more uneven client sizes")
    max_length: int = Field(
        2048, ge=8, description="tokens, image included; longer samples lose their end, never image tokens")
    limits: LimitsConfig = LimitsConfig()
    digits: DigitsConfig = DigitsConfig()


class ParticipationEntry(Section):
    round: int = Field(ge=1)
    clients: list[str]


class StragglersConfig(Section):
    share: float = Field(0.0, ge=0, le=1, description="probability that a client is slow in a round")
    steps: float = Field(0.5, gt=0, le=1, description="share of its steps that a slow client takes, at least one")


class PrivacyConfig(Section):
    """Differential privacy of uploads; off without `clip`."""

    clip: float | None = Field(None, gt=0, description="C, L2 norm to which what an upload changes is clipped")
    noise_multiplier: float | None = Field(None, gt=0, description="z: noise of standard deviation 2·z·C per entry")
    epsilon: float | None = Field(None, gt=0, description="instead: the ε that all uploads of a client may cost")
    delta: float = Field(1e-5, gt=0, lt=1, description="δ")

    @model_validator(mode="after")
    def _complete(self) -> PrivacyConfig:
        given = (self.noise_multiplier is not None) + (self.epsilon is not None)
        if (self.clip is not None) != (given == 1) or given > 1:
            raise ValueError("give clip and one of noise_multiplier and epsilon, or none of the three")
        return self


class FederationConfig(Section):
    clients: int | None = Field(None, ge=1, description="K for partition equal/dirichlet; 'given' takes it from data")
    rounds: int = Field(3, ge=1, le=1_000_000, description="R")
    clients_per_round: int | None = Field(None, ge=1, description="cohort size S; default: everyone")
    participation: Literal["uniform"] | list[ParticipationEntry] = Field(
        "uniform", description="uniform sampling, or who takes part in which round (rounds not listed: everyone)")
    joins: dict[str, int] = Field({}, description="newcomers: the first round in which a client can be sampled")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability that a client of the cohort drops out of a round; "
                           "one always stays")
    stragglers: StragglersConfig = StragglersConfig()
    on_bad_client: Literal["quarantine", "stop"] = Field(
        "quarantine", description="an upload that is not finite, of another shape, or exploded: leave it out of the "
        "round and let the client go on from what it had before, or stop")
    privacy: PrivacyConfig = PrivacyConfig()
    max_update_ratio: float | None = Field(
        100.0, gt=1, description="an update this many times longer than the cohort's median has exploded; null: none")
    local_epochs: int = Field(1, ge=1, description="E, passes over a client's data per phase")
    local_steps: int | None = Field(None, ge=1, description="steps per phase; overrides local_epochs")
    schedule: Literal["first_time", "every_round"] = Field(
        "first_time", description="stage 1 in a client's first round only, or in each")


class StrategyParams(Section):
    """The section `strategy`: the name, and beside it the keys of that strategy, which its own file adds."""

    name: str = Field("pilot", description="strategy: what clients train, share and get back; one of the package's, "
                      "or module:Class")


# The section of each strategy by name; `federation.strategies` fills it, a file a strategy.
STRATEGY_PARAMS: dict[str, type[StrategyParams]] = {}


def strategies() -> ModuleType:
    """The package of strategies, which lies above this one: imported by name, so that it registers its sections."""
    return importlib.import_module("pilot_jax.federation.strategies")


def _default_strategy() -> StrategyParams:
    strategies()
    return STRATEGY_PARAMS[StrategyParams.model_fields["name"].default]()


class TrainConfig(Section):
    batch_size: int = Field(8, ge=1, description="B, samples per client step")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="of the clients; its state lasts a phase")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, decoupled")
    adam_epsilon: float = Field(1e-8, gt=0, description="ε of AdamW's m / (√v + ε)")
    warmup: float = Field(0.03, ge=0, le=1, description="share of a client's own steps")
    lr_connector: float = Field(1e-3, gt=0, description="peak rate of every connector adapter; 2e-5 at 7B")
    lr_lora_stage1: float = Field(5e-3, gt=0, description="peak rate of LoRA in stage 1; 2e-5 at 7B")
    lr_lora_stage2: float = Field(3e-3, gt=0, description="peak rate of LoRA in stage 2; 4e-5 at 7B")
    lambda_d: float = Field(0.1, ge=0, description="λ0, weight of the difference loss")
    lambda_b: float = Field(0.1, ge=0, description="λ1, weight of the balance loss")
    lambda_z: float = Field(0.01, ge=0, description="λ2, weight of the router z-loss")
    ld_mode: Literal["token_cosine", "raw", "flat"] = Field(
        "token_cosine", description="how L_d compares task and client features, see docs/method.md")
    ld_center: bool = Field(False, description="centre each image's tokens before L_d (ablation)")


class EvalConfig(Section):
    every: int = Field(0, ge=0, description="score the validation split every so many rounds; 0: never")
    batch_size: int = Field(16, ge=1, description="prompts decoded at once, per client")
    max_new_tokens: int = Field(32, ge=1, description="of an answer")
    temperature: float = Field(0.0, ge=0, description="0: greedy; else answers are sampled")
    top_p: float = Field(1.0, gt=0, le=1, description="sample among the fewest tokens with this probability together")
    metrics: dict[str, Literal["exact", "iou", "vqa", "anls", "rouge_l", "bleu", "cider"]] = Field(
        {"grounding": "iou"}, description="score per task: exact match (default), iou (box IoU ≥ 0.5), vqa (ten "
        "annotators), anls (OCR), and with the extra 'scores' rouge_l, bleu, cider, which goes to 10")


class MeshConfig(Section):
    clients: int = Field(1, ge=1, description="devices over which a chunk's clients are spread")
    fsdp: int = Field(1, ge=1, description="devices that share the frozen weights, gathered layer by layer")
    tensor: int = Field(1, ge=1, description="devices that share heads and inner widths")

    @property
    def devices(self) -> int:
        return self.clients * self.fsdp * self.tensor


class SystemConfig(Section):
    seed: int = Field(0, ge=0, description="of initialisation, sampling and batch order")
    client_chunk: int = Field(3, ge=1, description="clients trained at once on each device")
    deterministic: bool = Field(False, description="on NVIDIA GPUs, the same algorithms in every run, and slower ones; "
                                "CPU and TPU repeat a run bit for bit without")
    steps_at_once: int | None = Field(
        None, ge=1, description="steps whose samples are on the devices at once, for clients whose data do not fit "
        "there; default: a whole phase's")
    client_devices: int | None = Field(
        None, ge=1, description="devices that train clients side by side; default: on CPU one per core (with a base "
        "under 0.5 GB, and if JAX has not started), else 1")
    length_spread: float = Field(
        1.2, ge=1, description="clients whose longest samples differ by up to this factor share one program: a smaller "
        "one pads less and compiles more")
    mesh: MeshConfig = Field(MeshConfig(), description="device mesh; default: one device, or client_devices")
    store: str | None = Field(
        None, description="folder for clients' adapters, tokens and image features, for populations that do not fit in "
        "memory; images are seen when a client is drawn; what a run puts there goes with it. Default: all in memory")
    unroll: int = Field(4, ge=1, description="decoder layers unrolled in the scan: faster on CPU, longer to compile. "
                        "With all of them unrolled, training computes the last one on answers alone")
    attention: Literal["own", "cudnn"] = Field(
        "own", description="of a decoder that trains. cudnn keeps no scores, on NVIDIA GPUs and in bfloat16; "
        "not measured yet")
    save_every: Literal["phase", "round", "never"] = Field(
        "phase", description="when a run saves what `--resume` goes on from")
    keep_saved: int = Field(2, ge=1, description="how many of these are kept, should the newest be damaged")
    tensorboard: bool = Field(False, description="write losses and scores for TensorBoard into the run directory too")
    compilation_cache: str | None = Field(None, description="folder for compiled programs; default: none")

    @model_validator(mode="after")
    def _whole_on_a_device(self) -> SystemConfig:
        if self.attention == "cudnn" and self.mesh.fsdp * self.mesh.tensor > 1:
            raise ValueError("attention: cudnn is for bases that are whole on each device; mesh.fsdp and mesh.tensor 1")
        return self


class Config(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    federation: FederationConfig = FederationConfig()
    strategy: SerializeAsAny[StrategyParams] = Field(default_factory=_default_strategy)
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    system: SystemConfig = SystemConfig()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
