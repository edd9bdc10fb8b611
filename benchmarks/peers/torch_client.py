"""A client in torch, which the peers share: LLaVA of transformers, LoRA in a few lines, AdamW, and one epoch a round.

It is written to be fast. All that comes before the first LoRA (tower, projector, embeddings) is frozen and is computed
once per client; logits are computed at the learnt tokens alone; AdamW is fused, and one optimizer is used again and
again with its state cleared.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from lora import TARGETS, Arrays, first_lora, read_settings
from torch import nn
from torch.nn import functional as F


class LoraLinear(nn.Module):
    """A frozen linear layer with W' = W + scale·B·A; A and B are trained."""

    def __init__(self, frozen: nn.Linear, a: np.ndarray, scale: float) -> None:
        super().__init__()
        self.frozen, self.scale = frozen, scale
        self.lora_a = nn.Parameter(torch.tensor(a))
        self.lora_b = nn.Parameter(torch.zeros(frozen.out_features, len(a)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(x) + self.scale * F.linear(F.linear(x, self.lora_a), self.lora_b)


class Client:
    """The model with LoRA and the data of all clients, which train with it one after another."""

    def __init__(self, work: str | Path, threads: int) -> None:
        from transformers import LlavaForConditionalGeneration

        torch.set_num_threads(threads)
        self.settings = read_settings(work)
        self.data = {name: array for name, array in np.load(Path(work) / "work.npz").items()}
        self.llava = LlavaForConditionalGeneration.from_pretrained(Path(work) / "base", dtype=torch.float32).eval()
        self.llava.requires_grad_(False)
        self.parameters: list[nn.Parameter] = []
        scale = self.settings["alpha"] / self.settings["rank"]
        for number, layer in enumerate(self.language_model.layers):
            for target in TARGETS:
                block = layer.self_attn if target in "qkvo" else layer.mlp
                name = f"{target}_proj"
                setattr(block, name, LoraLinear(block.get_submodule(name), self.data[f"{target}_a"][number], scale))
                self.parameters += [block.get_submodule(name).lora_a, block.get_submodule(name).lora_b]
        self.start = first_lora(work)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.settings["rate"], fused=True,
                                           weight_decay=self.settings["weight_decay"])

    @property
    def language_model(self) -> nn.Module:
        return self.llava.model.language_model

    def arrays(self) -> Arrays:
        """Returns copies of LoRA's current factors."""
        return [p.detach().numpy().copy() for p in self.parameters]

    @torch.no_grad()
    def load(self, arrays: Arrays) -> None:
        """Replaces LoRA's factors."""
        for parameter, array in zip(self.parameters, arrays, strict=True):
            parameter.copy_(torch.from_numpy(np.asarray(array)))

    @functools.cache  # noqa: B019 - there is one `Client` in a process
    @torch.no_grad()
    def inputs(self, client: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns a client's embeddings [n, L, width], image tokens included, and the tokens to learn [n, learnt]."""
        ids = torch.from_numpy(self.data["input_ids"][client])
        pixels = torch.from_numpy(self.data["pixels"][client])
        tower = self.llava.model.vision_tower(pixels, output_hidden_states=True)
        features = tower.hidden_states[self.llava.config.vision_feature_layer][:, 1:]
        image = self.llava.model.multi_modal_projector(features)
        text = self.llava.get_input_embeddings()(ids[:, image.shape[1]:])
        return torch.cat([image, text], dim=1), ids[:, -self.settings["learnt"]:].contiguous()

    def loss(self, embeddings: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross entropy of the learnt tokens of a batch."""
        hidden = self.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        logits = self.llava.lm_head(hidden[:, -self.settings["learnt"] - 1:-1])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def train(self, client: int, round_: int) -> float:
        """Trains a client in round `round_`, from 0, on LoRA's current factors; returns its mean loss."""
        embeddings, targets = self.inputs(client)
        self.optimizer.state.clear()
        losses = []
        for rows in torch.from_numpy(self.data["orders"][round_, client].astype(np.int64)):
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(embeddings[rows], targets[rows])
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return float(torch.stack(losses).mean())
