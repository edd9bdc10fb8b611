"""The section `train` of a config: local training, for all clients and for single ones."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pilot_jax.config.sections import Section
from pilot_jax.words import yaml_text


class ClientTrainConfig(Section):
    """The keys of `train` that a client can have for itself; null: the value of all."""

    batch_size: int | None = Field(None, ge=1, le=65_536, description="Number of samples in the client's step, at most "
                                   "`train.batch_size`.")
    lr_connector: float | None = Field(None, gt=0, description="Peak learning rate of the client's connector adapters.")
    lr_lora_stage1: float | None = Field(None, gt=0, description="Peak learning rate of the client's LoRA in stage 1, "
                                         "and in every phase of strategies without stages.")
    lr_lora_stage2: float | None = Field(None, gt=0, description="Peak learning rate of the client's LoRA in stage 2.")


class TrainConfig(Section):
    """Local training of the clients: batches, optimizer, learning rates and the weights of the losses."""

    batch_size: int = Field(8, ge=1, le=65_536, description="Number B of samples in a client's step.")
    microbatch: int | None = Field(
        None, ge=1, le=65_536, description="Number of a step's samples that pass the model at once, a divisor of "
        "`batch_size`: the step's gradient is accumulated over `batch_size` / `microbatch` parts. It is the same as "
        "without but for rounding, takes less memory and more time. null: all at once.")
    clip_norm: float | None = Field(
        None, gt=0, description="Largest L2 norm of a step's gradient, over all adapters that the client trains. A "
        "longer gradient is scaled down to it before the optimizer. null: no limit.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="Optimizer of the clients' local training: AdamW "
                                               "or plain SGD. Its state starts anew in every phase.")
    weight_decay: float = Field(0.0, ge=0, description="Coefficient of AdamW's decoupled weight decay. SGD has none.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Constant ε in AdamW's step m / (√v + ε).")
    warmup: float = Field(0.03, ge=0, le=1, description="Share of a client's steps in a phase in which the "
                          "learning rate rises linearly to its peak. 0: no rise.")
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the inputs of each LoRA that are set to 0 in training, at random, while "
        "the others are scaled up in turn, as in PEFT. 0: none. Strategies that mix several LoRA by a router refuse "
        "it.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="Course of the learning rate over a phase, beside the warm-up. cosine: a fall to 0 as a "
        "half cosine over the whole phase, warm-up included. linear: a straight fall to 0. constant: no fall.")
    lr_connector: float = Field(1e-3, gt=0, description="Peak learning rate of all connector adapters: Pilot's ψ_t, "
                                "ψ_s, ψ_c and router, and the projector of other strategies. "
                                "configs/llava15_7b.yaml has 2e-5 for a 7B model.")
    lr_lora_stage1: float = Field(5e-3, gt=0, description="Peak learning rate of LoRA in stage 1, and in every phase "
                                  "of strategies without stages. configs/llava15_7b.yaml has 2e-5 for a 7B model.")
    lr_lora_stage2: float = Field(3e-3, gt=0, description="Peak learning rate of LoRA in stage 2. "
                                  "configs/llava15_7b.yaml has 4e-5 for a 7B model.")
    lambda_d: float = Field(0.1, ge=0, description="Weight λ0 of the difference loss L_d in stage 1. 0: without it, an "
                            "ablation.")
    lambda_b: float = Field(0.1, ge=0, description="Weight λ1 of the router's load-balancing loss L_b in stage 2.")
    lambda_z: float = Field(0.01, ge=0, description="Weight λ2 of the router's z-loss L_z in stage 2.")
    ld_mode: Literal["token_cosine", "raw", "flat"] = Field(
        "token_cosine", description="Form of the difference loss L_d between x_t and x_s. token_cosine: ‖x_tᵀx_s‖_F² / "
        "N² per image, of tokens scaled to about norm 1. raw: ‖x_tᵀx_s‖_F² per image, as the paper writes it. flat: "
        "between whole images across the batch, as in the authors' code.")
    ld_center: bool = Field(False, description="Whether each image's mean token is subtracted from its tokens before "
                            "L_d is computed. true is an ablation.")
    clients: dict[str, ClientTrainConfig] = Field(
        {}, description="Keys that single clients have instead of those above, as {client: {key: value}}. Keys: "
        "batch_size, lr_connector, lr_lora_stage1, lr_lora_stage2.")

    def of_client(self, name: str) -> TrainConfig:
        """Returns the section with the values of one client."""
        own = self.clients.get(name)
        return self if own is None else self.model_copy(update=own.model_dump(exclude_none=True) | {"clients": {}})

    @model_validator(mode="after")
    def _whole_parts(self) -> TrainConfig:
        if self.microbatch is not None and self.batch_size % self.microbatch:
            raise ValueError(f"microbatch: {self.microbatch} does not divide batch_size, {self.batch_size}")
        if self.microbatch not in (None, self.batch_size) and self.ld_mode == "flat" and self.lambda_d > 0:
            raise ValueError("microbatch: ld_mode flat compares the images of a whole batch. Leave microbatch out, or "
                             "choose another ld_mode")
        for name, own in self.clients.items():
            if own.batch_size is not None and own.batch_size > self.batch_size:
                raise ValueError(f"clients.{name}.batch_size: {own.batch_size} is more than batch_size, which has to "
                                 "be the largest")
        return self


RATES = ("lr_connector", "lr_lora_stage1", "lr_lora_stage2")


def _scaled(section: TrainConfig | ClientTrainConfig, factor: float) -> dict[str, float]:
    return {name: value * factor for name in RATES if (value := getattr(section, name)) is not None}


def with_scaled_rates(train: TrainConfig, factor: float) -> TrainConfig:
    """Returns the section with all learning rates, those of single clients too, multiplied by `factor`."""
    clients = {name: own.model_copy(update=_scaled(own, factor)) for name, own in train.clients.items()}
    return train.model_copy(update=_scaled(train, factor) | {"clients": clients})


def scaled_rates(train: TrainConfig, factor: float) -> list[str]:
    """Returns overrides "train.key=value" that multiply all learning rates of the section by `factor`."""
    own = {name: section.model_dump(exclude_none=True) | _scaled(section, factor)
           for name, section in train.clients.items()}
    return [*(f"train.{name}={value!r}" for name, value in _scaled(train, factor).items()),
            *([f"train.clients={yaml_text(own)}"] if own else [])]
