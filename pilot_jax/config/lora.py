"""The keys of LoRA: its rank and scale, and how the server makes one LoRA of several."""

from __future__ import annotations

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

    targets: tuple[Target, ...] = Field(
        ("q", "k", "v", "o", "gate", "up", "down"), min_length=1, description="Linear layers that get LoRA, in every "
        "decoder layer: q, k, v, o of the attention and gate, up, down of the MLP. Default: all, as in LLaVA.")

    @property
    def largest(self) -> int:
        """The largest rank of a client, which all clients' arrays have."""
        return self.rank if isinstance(self.rank, int) else max(self.rank.values())

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
