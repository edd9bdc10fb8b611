"""Exported clients in torch: `load(folder)` returns a client's model, a model of transformers, which answers questions.

It needs torch and peft (the extra `torch`), and JAX only for a base of separate parts. Nothing else in the package
imports this file.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from pilot_jax.data.conversations import IMAGE, encode, stop_tokens
from pilot_jax.data.images import fit_image, read_image
from pilot_jax.data.llava.sample import Sample
from pilot_jax.errors import InputError
from pilot_jax.files import read_json
from pilot_jax.models.checkpoints.gguf import is_gguf, open_gguf
from pilot_jax.models.checkpoints.hf_config import read_vlm_config
from pilot_jax.models.checkpoints.processors import IMAGE_TOKEN, load_image_processor, load_tokenizer
from pilot_jax.models.packaged import model_directory
from pilot_jax.models.spec import VlmSpec

try:
    import peft
    import torch
    import transformers
    from torch import nn
except ImportError as error:
    raise ImportError("pilot_jax.torch needs torch and peft. Install them, or in a clone the extra: "
                      "pip install -e '.[torch]'") from error


class Mlp(nn.Module):
    """LLaVA's projector, two linear layers with GELU between them: [..., D] to [..., C]."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        for layer in ("linear_1", "linear_2"):
            weight = tensors[f"{layer}.weight"]
            setattr(self, layer, nn.Linear(weight.shape[1], weight.shape[0], bias=f"{layer}.bias" in tensors))
        self.load_state_dict(dict(tensors))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(nn.functional.gelu(self.linear_1(features)))


class Connector(nn.Module):
    """An exported connector, in the place of LLaVA's projector: image features [B, N, D] to image tokens [B, N, C].

    Its adapters are named as in the paper, §3.2–3.3: ψ_t is "task", ψ_s "client", ψ_t^i "task_bank/i" and ψ_c^i
    "cross_task/i".
    """

    def __init__(self, file: str | Path) -> None:
        """Reads `connector.safetensors` of an exported folder.

        Raises:
            InputError: the file cannot be read, or is no connector.
        """
        from safetensors import SafetensorError, safe_open

        super().__init__()
        try:
            with safe_open(file, framework="pt") as opened:
                about = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            self.stage, self.own_task = about["stage"], int(about["task_index"])
            self.num_tasks = len(json.loads(about["tasks"]))
            router = tensors.pop("router.weight", None)  # [T, D]
            self.router = None if router is None else nn.Parameter(router)
            grouped: dict[str, dict[str, torch.Tensor]] = {}
            for name, tensor in tensors.items():
                adapter, layer, leaf = name.rsplit(".", 2)
                grouped.setdefault(adapter.replace(".", "/"), {})[f"{layer}.{leaf}"] = tensor
            self.adapters = nn.ModuleDict({name: Mlp(own) for name, own in grouped.items()})
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"{file}: not an exported connector ({type(error).__name__}: {error}). Export the client "
                             "again.") from None
        self.requires_grad_(False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.stage == "plain":
            return self.adapters["projector"](features)
        out = self.adapters["client"](features) if "client" in self.adapters else 0  # an ablation has no ψ_s
        if self.stage == "stage1":
            return self.adapters["task"](features) + out
        assert self.router is not None
        shares = nn.functional.linear(features, self.router).float().softmax(-1).to(features.dtype)  # [B, N, T]
        for i in range(self.num_tasks):
            if i == self.own_task:
                expert = self.adapters["task"](features)
            else:
                expert = self.adapters[f"task_bank/{i}"](features) + self.adapters[f"cross_task/{i}"](features)
            out = out + shares[..., i, None] * expert
        return out


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    """A client's model in torch, with what it takes to ask it."""

    model: Any  # transformers' model, LoRA of PEFT included
    spec: VlmSpec  # the model's shapes
    tokenizer: Any
    image_processor: Any  # None: the model is a language model alone
    about: dict[str, Any]  # the content of pilot_jax.json

    def inputs(self, image: str | Path | Image.Image | None, question: str) -> dict[str, torch.Tensor]:
        """Returns the model's arguments for a question: input_ids, attention_mask [1, L], pixel_values [1, 3, H, W].

        Args:
            image: a file or a picture, before which the question is asked; None: no image, and no pixel_values.

        Raises:
            InputError: the image cannot be read, or the model takes none.
        """
        if image is not None and self.image_processor is None:
            raise InputError("This client's model is a language model alone, which takes no images. Give None.")
        text = question if image is None else f"{IMAGE}\n{question}"
        ids = encode(self.tokenizer, (("human", text),), self.about["template"], self.spec.num_image_tokens).input_ids
        out = {"input_ids": torch.tensor(ids[None], dtype=torch.long)}
        out["attention_mask"] = torch.ones_like(out["input_ids"])
        if image is not None:
            picture = image if isinstance(image, Image.Image) else Path(image)
            shown = read_image(Sample("", picture, (), "", "", "", "image"))
            image = fit_image(shown, self.about["image_fit"], self.image_processor)
            pixels = self.image_processor(images=[image], return_tensors="pt")["pixel_values"]
            out["pixel_values"] = pixels.to(self.model.dtype)
        return {name: value.to(self.model.device) for name, value in out.items()}

    def ask(self, image: str | Path | Image.Image | None, question: str, max_new_tokens: int = 64) -> str:
        """Returns the answer to a question about an image, decoded greedily; see `inputs`."""
        inputs, stop = self.inputs(image, question), list(stop_tokens(self.tokenizer, self.about["template"]))
        with torch.no_grad():
            tokens = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=stop,
                                         pad_token_id=stop[0])
        answer = tokens[0, inputs["input_ids"].shape[1]:].tolist()
        return str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()


def load(folder: str | Path, base: str | Path | None = None, dtype: str = "float32", device: str = "cpu"
         ) -> ExportedModel:
    """Loads a client that `pilot-jax export RUN --client K --out DIR` wrote.

    Args:
        folder: the exported folder.
        base: the base model's directory, or its name on the Hugging Face Hub; None: the one that the run used. A base
            of separate parts is read from the paths that the run used.
        dtype: the data type of weights and computation, as torch names it.
        device: torch's name of the device.

    Raises:
        InputError: the folder is not an exported client, or the base cannot be read.
    """
    folder = Path(folder)
    about = read_json(folder / "pilot_jax.json", "Give a folder that `pilot-jax export … --out DIR` wrote.")
    if about.get("format") != 1 or not {"base", "parts", "template", "image_fit"} <= set(about):
        raise InputError(f"{folder / 'pilot_jax.json'}: format {about.get('format')!r}, expected 1. Export the client "
                         "again, or use a newer pilot_jax.")
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise InputError(f"dtype: {dtype!r} is not known. Use float32, bfloat16 or float16.")
    if about["parts"] is not None and base is None:
        model, spec, text, images = _from_parts(folder, about["parts"], kind)
    else:
        text = images = _directory(about["base"] if base is None else base)
        spec = read_vlm_config(text)
        model = transformers.LlavaForConditionalGeneration.from_pretrained(text, dtype=kind)
        if (folder / "connector.safetensors").is_file():
            model.model.multi_modal_projector = Connector(folder / "connector.safetensors").to(kind)
        model = peft.PeftModel.from_pretrained(model, folder)
    processor = None if images is None else load_image_processor(images, spec.tower.family)
    return ExportedModel(model.eval().to(device), spec, load_tokenizer(text), processor, about)


def _directory(base: str | Path) -> Path:
    """Returns the directory of a base model, which is fetched from the hub if no directory has this name."""
    directory = model_directory(base)
    if directory.is_dir():
        return directory
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(base)))
    except Exception as error:  # of its HTTP library, or of the hub's own kinds
        why = " ".join(str(error).split())[:200]
        raise InputError(f"base: {base} is no directory here, and not to be had from the hub ({why}). Give the base "
                         "model's directory: load(folder, base=…).") from None


def _language_model(language: Path, rows: int, dtype: torch.dtype) -> Any:
    """Returns a language model, its vocabulary filled up to `rows` with mean rows, which no answer chooses."""
    if is_gguf(language):
        opened = open_gguf(language)
        config = transformers.AutoConfig.for_model(**opened.config)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        weights = model.state_dict()
        for name in opened.shapes():
            weights[name].copy_(torch.tensor(opened.read(name)))
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(language, dtype=dtype)
    known = model.config.vocab_size
    if rows > known:
        model.resize_token_embeddings(rows, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.data[known:] = layer.weight.data[:known].mean(0)
    return model


def _from_parts(folder: Path, parts: Mapping[str, Any], dtype: torch.dtype
                ) -> tuple[Any, VlmSpec, Path, Path | None]:
    """Returns a model on a base of separate parts, its shapes, and the paths of its tokenizer and image processor."""
    from pilot_jax.models.checkpoints.parts import config_of, read_language_config, read_parts_config  # imports JAX

    vision, language, projector = (None if parts[name] is None else Path(parts[name]).expanduser()
                                   for name in ("vision", "language", "projector"))
    assert language is not None
    if vision is None or projector is None:
        spec = read_language_config(language)
        model = _language_model(language, spec.text.vocab_size, dtype)
        return peft.PeftModel.from_pretrained(model, folder), spec, language, None
    token = load_tokenizer(language).convert_tokens_to_ids(IMAGE_TOKEN)
    spec = read_parts_config(vision, language, projector, parts["feature_layer"], parts["feature_select"], token)
    model = _language_model(language, max(spec.text.vocab_size, token + 1), dtype)
    peft.PeftModel.from_pretrained(model, folder)  # puts LoRA into the model's own layers
    config = transformers.LlavaConfig(
        vision_config=config_of(vision, "vision")[0], text_config=model.config, image_token_index=token,
        vision_feature_layer=parts["feature_layer"],
        vision_feature_select_strategy="default" if spec.drop_first else "full",
        multimodal_projector_bias=spec.projector_bias)
    with torch.device("meta"):
        whole = transformers.LlavaForConditionalGeneration(config)
    tower = type(whole.model.vision_tower)
    whole.model.vision_tower = tower.from_pretrained(vision, config=config.vision_config, dtype=dtype)
    whole.model.language_model, whole.lm_head = model.model, model.lm_head
    connector = folder / "connector.safetensors"
    if not connector.is_file():  # LoRA alone was trained: the projector is the base's
        raise InputError(f"{connector} does not exist. For a client without a connector on a base of parts, export the "
                         "whole model (--merged).")
    whole.model.multi_modal_projector = Connector(connector).to(dtype)
    whole.generation_config = model.generation_config
    return whole, spec, language, vision
