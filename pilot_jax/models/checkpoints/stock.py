"""Writes a checkpoint's other files: config, tokenizer, chat template, image processor, generation settings.

`transformers` and other programs read them beside the weights, so that nothing of this package is needed.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pilot_jax.files import read_json
from pilot_jax.models.checkpoints.gguf import is_gguf, open_gguf
from pilot_jax.models.checkpoints.parts import config_of
from pilot_jax.models.checkpoints.processors import IMAGE_TOKEN, load_tokenizer, processor_files
from pilot_jax.models.spec import VlmSpec

# Files beside the weights that are copied. No code is among them.
_SUFFIXES, _NAMES = (".json", ".model", ".txt", ".jinja"), ("LICENSE", "NOTICE", "USE_POLICY")
_PROCESSORS = {"clip": "CLIPImageProcessor", "siglip": "SiglipImageProcessor", "dinov2": "BitImageProcessor"}


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Writes a JSON object, indented."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_side_files(directory: Path, folder: Path) -> None:
    """Copies what is not weights from a checkpoint's directory: config, tokenizer, image processor, licence."""
    for file in sorted(directory.iterdir()):
        wanted = file.suffix in _SUFFIXES or file.name.upper().startswith(_NAMES)
        if file.is_file() and wanted and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)


def write_language_files(language: Path, folder: Path, dtype: str) -> None:
    """Writes config and tokenizer of a language model alone."""
    if not is_gguf(language):
        copy_side_files(language, folder)
        return
    opened = open_gguf(language)
    names = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
    write_json(folder / "config.json", opened.config | {"architectures": [names[opened.architecture]], "dtype": dtype})
    opened.tokenizer().save_pretrained(folder)


def write_part_files(vision: Path, language: Path, spec: VlmSpec, feature_layer: int | list[int], dtype: str,
                     folder: Path) -> int:
    """Writes config, tokenizer and image processor of a LLaVA model that is made of parts.

    Args:
        spec: the model's shapes.
        feature_layer: LLaVA's vision_feature_layer.
        dtype: the data type of the weights.

    Returns: the size of the vocabulary, in which `<image>` has a row.
    """
    tokenizer = load_tokenizer(language)
    tokenizer.save_pretrained(folder)
    rows = max(spec.text.vocab_size, spec.image_token_id + 1)
    own = ("dtype", "torch_dtype", "architectures", "transformers_version")
    text, tower = ({k: v for k, v in config_of(path, key)[0].items() if k not in own}
                   for path, key in ((language, "language"), (vision, "vision")))
    write_json(folder / "config.json", {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "dtype": dtype,
        "image_token_index": spec.image_token_id, "image_seq_length": spec.num_image_tokens,
        "vision_feature_layer": feature_layer,
        "vision_feature_select_strategy": "default" if spec.drop_first else "full",
        "projector_hidden_act": "gelu", "multimodal_projector_bias": spec.projector_bias,
        "tie_word_embeddings": spec.text.tie_word_embeddings, "text_config": text | {"vocab_size": rows},
        "vision_config": tower})
    raw = read_json(processor_files(vision)[0], "")
    raw = raw.get("image_processor", raw)
    kind = {"image_processor_type": _PROCESSORS[spec.tower.family]}
    write_json(folder / "preprocessor_config.json", kind | {k: v for k, v in raw.items() if k != "processor_class"})
    return rows


def add_processor(folder: Path, spec: VlmSpec) -> None:
    """Adds what transformers' LlavaProcessor needs to the file of its settings, where it lacks it."""
    file = folder / "processor_config.json"
    known = read_json(file, "") if file.is_file() else {}
    needed = {"processor_class": "LlavaProcessor", "image_token": IMAGE_TOKEN, "patch_size": spec.tower.patch_size,
              "num_additional_image_tokens": int(spec.tower.has_cls),
              "vision_feature_select_strategy": "default" if spec.drop_first else "full"}
    write_json(file, needed | {k: v for k, v in known.items() if v is not None})


def add_chat(folder: Path, template: str | None, stop: tuple[int, ...]) -> None:
    """Writes the chat template with which a model was trained, and the tokens that end its answers.

    Args:
        template: a Jinja template; None: that of the tokenizer stays.
    """
    file = folder / "generation_config.json"
    known = read_json(file, "") if file.is_file() else {}
    write_json(file, known | {"eos_token_id": list(stop)})
    if template is None:
        return
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "chat_template.json").unlink(missing_ok=True)  # older places of the template
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        raw = read_json(settings, "")
        if raw.pop("chat_template", None) is not None:
            write_json(settings, raw)
