"""Pilot's local phases in PyTorch, with LLaVA of transformers and LoRA of PEFT; clients train one after another.

`tuned=False` is a straightforward implementation: the vision tower runs in every step, logits are computed at every
position, and each client and phase has a new optimizer. `tuned=True` is optimised: image features are cached, logits
are computed for answer tokens only, AdamW is fused, and one optimizer is used whose state is cleared.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


class Mlp(nn.Module):
    def __init__(self, d: int, c: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(d, c), nn.Linear(c, c)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class Connector(nn.Module):
    """Pilot's connector as a torch user would write it; `outputs` has the arrays that the losses need."""

    def __init__(self, d: int, c: int, tasks: int) -> None:
        super().__init__()
        self.task, self.client = Mlp(d, c), Mlp(d, c)
        self.bank = nn.ModuleList(Mlp(d, c) for _ in range(tasks))
        self.cross = nn.ModuleList(Mlp(d, c) for _ in range(tasks))
        self.router = nn.Linear(d, tasks, bias=False)
        self.stage, self.own, self.outputs = "stage1", 0, {}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.stage == "stage1":
            x_t, x_s = self.task(features), self.client(features)
            self.outputs = {"x_t": x_t, "x_s": x_s}
            return x_t + x_s
        logits = self.router(features)
        share = logits.softmax(-1)
        out = self.client(features)
        for i, (bank, cross) in enumerate(zip(self.bank, self.cross, strict=True)):
            expert = self.task(features) if i == self.own else bank(features) + cross(features)
            out = out + share[..., i:i + 1] * expert
        self.outputs = {"router_logits": logits}
        return out


def difference_loss(x_t: torch.Tensor, x_s: torch.Tensor) -> torch.Tensor:
    eps2 = (0.1 * x_t.norm(dim=-1).mean(-1).detach())[:, None, None] ** 2
    t, s = (x / (x.square().sum(-1, keepdim=True) + eps2).sqrt() for x in (x_t, x_s))
    gram = (t @ t.transpose(1, 2)) * (s @ s.transpose(1, 2))
    return (gram.sum((1, 2)) / x_t.shape[1] ** 2).mean()


def balance_loss(logits: torch.Tensor) -> torch.Tensor:
    probs = logits.softmax(-1)
    share = F.one_hot(probs.argmax(-1), probs.shape[-1]).float().mean(1)
    return (probs.shape[-1] * (share * probs.mean(1)).sum(-1)).mean()


class TorchPeer:
    """The local phases of a federation; the module's docstring says what `tuned` changes."""

    def __init__(self, base: str, clients: list[dict[str, Any]], rates: dict[str, tuple[float, float]], *, rank: int,
                 alpha: int, tasks: int, batch: int, tuned: bool, dtype: torch.dtype = torch.float32) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import LlavaForConditionalGeneration

        model = LlavaForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()
        names = "(q|k|v|o|gate|up|down)_proj"
        pattern = rf".*language_model\.layers\.\d+\.(self_attn|mlp)\.{names}"
        projector = model.model.multi_modal_projector
        self.connector = Connector(projector.linear_1.in_features, projector.linear_1.out_features, tasks)
        for mlp in (self.connector.task, *self.connector.bank, self.connector.client, *self.connector.cross):
            mlp.load_state_dict({k: v for k, v in projector.state_dict().items() if k.startswith("linear")})
        for mlp in (self.connector.client, *self.connector.cross):  # as with `strategy.init: preserve`
            nn.init.zeros_(mlp.linear_2.weight)
            nn.init.zeros_(mlp.linear_2.bias)
        self.model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern))
        self.model.base_model.model.model.multi_modal_projector = self.connector
        self.model.to(dtype)
        self.dtype = dtype
        self.connector.requires_grad_(True)
        self.llava = self.model.base_model.model
        self.clients, self.rates, self.batch, self.tuned = clients, rates, batch, tuned
        self.features = [None] * len(clients)
        if tuned:
            with torch.no_grad():
                self.features = [torch.cat([self._tower(torch.tensor(c["pixels"][i:i + 64], dtype=dtype))
                                            for i in range(0, len(c["pixels"]), 64)]) for c in clients]
        self.adapters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.start = {n: p.detach().clone() for n, p in self.adapters.items()}
        self.states: list[dict[str, torch.Tensor]] = [dict(self.start) for _ in clients]
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def load(self, lora: dict[str, np.ndarray], router: np.ndarray) -> None:
        """Makes clients start with the same LoRA and router as in the other systems."""
        for name in self.start:
            if "lora_" in name:
                self.start[name] = torch.tensor(lora[name.replace(".default", "")], dtype=self.dtype)
            elif "router" in name:
                self.start[name] = torch.tensor(router, dtype=self.dtype)
        self.reset()

    def reset(self) -> None:
        self.states = [dict(self.start) for _ in self.clients]

    def _tower(self, pixels: torch.Tensor) -> torch.Tensor:
        config = self.llava.config
        states = self.llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        return states[config.vision_feature_layer][:, 1:]

    def _trained(self, stage: str) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        parts = {"stage1": ("task", "client"), "stage2": ("task", "cross", "router")}[stage]
        lora, connector = [], []
        for name, parameter in self.adapters.items():
            inside = name.split("multi_modal_projector.")[-1].split(".")[0]
            parameter.requires_grad_("lora_" in name or inside in parts)
            if parameter.requires_grad:
                (lora if "lora_" in name else connector).append(parameter)
        return lora, connector

    def _optimizer(self, stage: str) -> torch.optim.Optimizer:
        lora, connector = self._trained(stage)
        if self.tuned and stage in self.optimizers:
            optimizer = self.optimizers[stage]
            optimizer.state.clear()
            return optimizer
        lr_lora, lr_connector = self.rates[stage]
        self.optimizers[stage] = torch.optim.AdamW(
            [{"params": lora, "lr": lr_lora}, {"params": connector, "lr": lr_connector}], weight_decay=0.0,
            fused=True if self.tuned else None)
        return self.optimizers[stage]

    def _loss(self, client: int, rows: np.ndarray, stage: str) -> torch.Tensor:
        data = self.clients[client]
        length = int(data["attention_mask"][rows].sum(1).max())  # the collator pads to the longest of the batch
        ids = torch.tensor(data["input_ids"][rows, :length].astype(np.int64))
        mask = torch.tensor(data["attention_mask"][rows, :length].astype(np.int64))
        weights = torch.tensor(data["target_weights"][rows])
        targets = torch.tensor(data["target_ids"][rows].astype(np.int64))
        positions = torch.tensor(data["target_positions"][rows].astype(np.int64))
        if self.tuned:
            seen = weights > 0
            image = self.connector(self.features[client][rows])
            embeds = self.llava.get_input_embeddings()(ids)
            embeds = embeds.masked_scatter((ids == self.llava.config.image_token_id)[..., None], image)
            hidden = self.llava.model.language_model(inputs_embeds=embeds, attention_mask=mask,
                                                     use_cache=False).last_hidden_state
            picked = hidden[torch.arange(len(rows))[:, None].expand_as(positions)[seen], positions[seen]]
            loss = F.cross_entropy(self.llava.lm_head(picked), targets[seen])
        else:
            labels = torch.full_like(ids, -100)
            r, a = np.nonzero(data["target_weights"][rows])
            labels[r, data["target_positions"][rows][r, a] + 1] = targets[r, a]
            pixels = torch.tensor(data["pixels"][rows], dtype=self.dtype)
            loss = self.model(input_ids=ids, attention_mask=mask, pixel_values=pixels, labels=labels).loss
        aux = self.connector.outputs
        if stage == "stage1":
            return loss + 0.1 * difference_loss(aux["x_t"], aux["x_s"])
        logits = aux["router_logits"]
        return loss + 0.1 * balance_loss(logits) + 0.01 * logits.logsumexp(-1).square().mean()

    def phase(self, stage: str, orders: dict[int, np.ndarray]) -> dict[int, list[float]]:
        """Trains the clients in `orders`, whose arrays [steps, B] have the rows of each batch; returns all losses."""
        losses: dict[int, list[float]] = {}
        self.connector.stage = stage
        for client, order in orders.items():
            with torch.no_grad():
                for name, parameter in self.adapters.items():
                    parameter.copy_(self.states[client][name])
            self.connector.own = self.clients[client]["task_index"]
            optimizer = self._optimizer(stage)
            steps, warm = len(order), max(1, math.ceil(0.03 * len(order)))
            for group, rate in zip(optimizer.param_groups, self.rates[stage], strict=True):
                group["lr"] = group["initial_lr"] = rate
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda i, s=steps, w=warm: min(1, (i + 1) / w) * 0.5 * (1 + math.cos(math.pi * i / s)))
            out = []
            for rows in order:
                optimizer.zero_grad(set_to_none=True)
                loss = self._loss(client, rows, stage)
                loss.backward()
                optimizer.step()
                schedule.step()
                out.append(loss.item())
            losses[client] = out
            self.states[client] = {n: p.detach().clone() for n, p in self.adapters.items()}
        return losses
