"""The keys of LoRA: its rank and scale, and how the server makes one LoRA of several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pilot_jax.config.sections import Section
from pilot_jax.errors import InputError

Combine = Literal["factors", "product", "aligned", "exact"]
Target = Literal["q", "k", "v", "o", "gate", "up", "down"]
Rank = Annotated[int, Field(ge=1, le=4_096)]


class LoraConfig(Section):
    """LoRA on linear layers of the language model: W' = W + (alpha / rank)·B·A."""

    rank: Rank | dict[str, Rank] = Field(
        8, description="Rank R of LoRA's factors A [R, d_in] and B [d_out, R]. The paper has 64 for a 7B model. With "
        "ranks that differ, {client: rank}; `\"*\"` stands for all clients that are not named. Each client's factor is "
        "alpha / its own rank.")
    alpha: float = Field(16.0, gt=0, description="Numerator of the factor alpha / rank by which B·A is multiplied. The "
                         "paper has 128.")

    layer_ranks: dict[str, Rank] = Field(
        {}, description="Ranks of some decoder layers, at most `rank`, as {\"0-3\": 2, \"7\": 4}; layers count from 0, "
        "and the others have `rank`. The factor alpha / rank stays the same in all. Only with `combine: factors`.")
    targets: tuple[Target, ...] = Field(
        ("q", "k", "v", "o", "gate", "up", "down"), min_length=1, description="Linear layers that get LoRA, in every "
        "decoder layer: q, k, v, o of the attention and gate, up, down of the MLP. Default: all, as in LLaVA.")

    def ranks_of(self, layers: int) -> tuple[int, ...]:
        """Returns the rank of each of a model's decoder layers; () if `layer_ranks` is empty.

        Raises:
            InputError: a layer does not exist or is named twice, or its rank is above `rank`.
        """
        if not self.layer_ranks:
            return ()
        ranks = [0] * layers
        for name, rank in self.layer_ranks.items():
            first, _, last = name.partition("-")
            numbers = range(int(first), int(last or first) + 1)
            what = f"model.lora.layer_ranks: {name}"
            if not numbers or numbers[-1] >= layers:
                raise InputError(f"{what}: the model has the layers 0 to {layers - 1}. Name one, or first-last.")
            if rank > self.largest:
                raise InputError(f"{what} has rank {rank}, above model.lora.rank, {self.largest}, which has to be the "
                                 "largest.")
            for number in numbers:
                if ranks[number]:
                    raise InputError(f"{what}: layer {number} has a rank already. Name each layer once.")
                ranks[number] = rank
        return tuple(rank or self.largest for rank in ranks)

    @property
    def largest(self) -> int:
        """The largest rank of a client, which all clients' arrays have."""
        return self.rank if isinstance(self.rank, int) else max(self.rank.values())

    @field_validator("layer_ranks")
    @classmethod
    def _numbers_of_layers(cls, value: dict[str, int]) -> dict[str, int]:
        """Refuses a key that names no layers."""
        for name in value:
            if not re.fullmatch("[0-9]{1,4}(-[0-9]{1,4})?", name):
                raise ValueError(f"{name!r} names no layer: give a number, or first-last, as 0-3")
        return value

    @field_validator("targets")
    @classmethod
    def _none_twice(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        """Refuses a layer that is named twice."""
        if len(set(value)) < len(value):
            raise ValueError("a layer is in the list twice")
        return value

    @model_validator(mode="after")
    def _some_rank(self) -> LoraConfig:
        if self.rank == {}:
            raise ValueError("rank has no client")
        return self


def combine_field(default: str) -> Any:
    """Returns the field `combine` of a strategy's section, with a default of its own.

    A strategy that is FedAvg with one value has it as the type `Literal[value]` too, so that no other is accepted.
    """
    return Field(
        default, description="Way in which the server makes one LoRA of several, given their weights. factors: the "
        "means of A and of B. product: the LoRA of the same rank that is nearest to the mean of the products B·A. "
        "aligned: the means of A and B after each pair is rotated to the server's model (in a client's own mixture, to "
        "its own pair), which does not change B·A. exact: as factors, and what the mean of the products has beyond "
        "them is added to the frozen weights; for strategies with one model for all.")


def client_ranks(rank: int | Mapping[str, int], names: Sequence[str]) -> tuple[int, ...] | None:
    """Returns the LoRA rank of each client; None for one rank of all.

    Raises:
        InputError: a client has no rank, or there is no client of a name.
    """
    if isinstance(rank, int):
        return None
    if unknown := sorted(set(rank) - {*names, "*"}):
        raise InputError(f"model.lora.rank: unknown client {unknown[0]!r}. Known: {', '.join(names)}.")
    if missing := [name for name in names if name not in rank and "*" not in rank]:
        raise InputError(f"model.lora.rank: no rank for client {missing[0]!r}. Add it, or give '*' for all others.")
    return tuple(rank[name] if name in rank else rank["*"] for name in names)
