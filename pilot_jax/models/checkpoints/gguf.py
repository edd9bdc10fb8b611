"""Reads a GGUF file, llama.cpp's format, as a Llama or Qwen2 language model: its config, tensors and tokenizer.

The result is what Hugging Face's directory of the same model holds: tensors under its names and in its layout, with
quantised weights turned into float32. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pilot_jax.errors import InputError
from pilot_jax.models.checkpoints.gguf_tokenizer import gguf_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ARCHITECTURES = ("llama", "qwen2")  # Vicuna and Mistral are stored as "llama"
_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_TENSORS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
                  "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
                  "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def is_gguf(path: Path) -> bool:
    """Returns whether a language model's path is that of a GGUF file."""
    return path.suffix == ".gguf"


def hf_name(name: str) -> str:
    """Returns Hugging Face's name of a tensor in a GGUF file; a name that is unknown is returned as it is."""
    stem, _, kind = name.rpartition(".")
    if stem in _TENSORS:
        return f"{_TENSORS[stem]}.{kind}"
    block, _, rest = stem.partition(".")
    number, _, part = rest.partition(".")
    return f"model.layers.{number}.{_LAYER_TENSORS[part]}.{kind}" if block == "blk" and part in _LAYER_TENSORS else name


def halves_apart(rows: np.ndarray, heads: int) -> np.ndarray:
    """Returns the rows [heads·d, …] of a query or key projection in Hugging Face's order.

    Of each head, llama.cpp alternates rows of the first and of the second half, which rotary embeddings pair. Hugging
    Face has one half after the other.
    """
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


@lru_cache(maxsize=2)
def open_gguf(file: Path) -> GgufFile:
    """Returns the opened file; one that was just opened is not parsed again."""
    return GgufFile(file)


class GgufFile:
    """A language model in a GGUF file, opened for reading; tensors are read and turned into float32 one at a time.

    Raises:
        InputError: the package gguf is missing, or the file holds no model that this package can run.
    """

    def __init__(self, file: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError:
            raise InputError(f"{file}: reading a .gguf file needs the package gguf. Install it: pip install "
                             "'gguf>=0.10'") from None
        self.file = file
        if not file.is_file():
            raise InputError(f"{file} does not exist. model.parts.language must be a Hugging Face directory or a .gguf "
                             "file.")
        try:
            reader = GGUFReader(file)
            self._fields = {name: field.contents() for name, field in reader.fields.items()}
            self._tensors = {hf_name(t.name): t for t in reader.tensors}
        except Exception as error:  # of a damaged file, the reader raises whatever its parsing meets
            raise InputError(f"{file}: not a readable GGUF file ({type(error).__name__}: {error}). Fetch it "
                             "again.") from None
        self.architecture = str(self._fields.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise InputError(f"{file}: general.architecture is {self.architecture!r}, expected one of "
                             f"{', '.join(ARCHITECTURES)}. Give another model.")

    def _get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """Returns the value of a key of the architecture, or `default`, if there is one and the key is missing."""
        name = f"{self.architecture}.{key}"
        value = self._fields.get(name, default)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{self.file}: {name} is {value!r}, expected a number. Fetch the file again.")
        return value

    def _refuse_what_is_not_read(self, head_dim: int) -> None:
        """Raises an InputError for positions or layers of a kind that this package does not read from GGUF."""
        remedy = "is not read from GGUF files. Give the model's Hugging Face directory instead."
        scaling = self._fields.get(f"{self.architecture}.rope.scaling.type", "none")
        if "rope_freqs.weight" in self._tensors or scaling != "none":
            raise InputError(f"{self.file}: the scaling of its rotary positions {remedy}")
        if self._get("rope.dimension_count", int, head_dim) != head_dim:
            raise InputError(f"{self.file}: rotation of a part of each head {remedy}")
        if f"{self.architecture}.expert_count" in self._fields:
            raise InputError(f"{self.file}: a mixture of experts {remedy}")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of Hugging Face's config.json of this model."""
        width, heads = self._get("embedding_length", int), self._get("attention.head_count", int)
        if not 0 < heads <= width:
            raise InputError(f"{self.file}: {self.architecture}.attention.head_count is {heads}, of width {width}. "
                             "Fetch the file again.")
        head_dim = self._get("attention.key_length", int, width // heads)
        self._refuse_what_is_not_read(head_dim)
        embedding = self.shapes().get("model.embed_tokens.weight")
        if embedding is None:
            raise InputError(f"{self.file}: token_embd.weight is missing. Fetch the file again.")
        raw = {"model_type": self.architecture, "hidden_size": width, "num_attention_heads": heads,
               "intermediate_size": self._get("feed_forward_length", int), "vocab_size": embedding[0],
               "num_hidden_layers": self._get("block_count", int), "hidden_act": "silu",
               "num_key_value_heads": self._get("attention.head_count_kv", int, heads),
               "max_position_embeddings": self._get("context_length", int),
               "rms_norm_eps": round(self._get("attention.layer_norm_rms_epsilon", float), 12),  # stored as float32
               "rope_theta": self._get("rope.freq_base", float, 10000.0),
               "tie_word_embeddings": "lm_head.weight" not in self._tensors}
        if self.architecture == "llama":
            raw |= {"head_dim": head_dim, "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors}
        elif head_dim != width // heads:
            raise InputError(f"{self.file}: heads of width {head_dim} are not known of Qwen2. Fetch the file again.")
        tokens = {f"{kind}_token_id": self._fields.get(f"tokenizer.ggml.{name}_token_id")
                  for kind, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
        return raw | {key: value for key, value in tokens.items() if isinstance(value, int)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the tensors' shapes by Hugging Face's names."""
        return {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    def dtype(self, key: str) -> str:
        """Returns the data type in which a checkpoint holds this tensor: float16 if it is quantised here."""
        return {"F32": "float32", "BF16": "bfloat16"}.get(self._tensors[key].tensor_type.name, "float16")

    def read(self, key: str) -> np.ndarray:
        """Returns a tensor in float32, in Hugging Face's layout."""
        from gguf import dequantize

        tensor = self._tensors[key]
        try:
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32).reshape(self.shapes()[key])
        except Exception as error:  # its types of quantisation grow from release to release
            raise InputError(f"{self.file}: {tensor.name} ({tensor.tensor_type.name}) cannot be read ({error}). Give "
                             "the model in another quantisation, such as Q8_0.") from None
        heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}
        letter = key.rsplit(".", 2)[-2].removesuffix("_proj")
        if self.architecture == "llama" and letter in heads:
            return halves_apart(values, self.config[heads[letter]])
        return values

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Returns the file's tokenizer as one of transformers.

        Raises:
            InputError: it is of a kind that this package does not read, or is incomplete.
        """
        return gguf_tokenizer(self.file, self._fields)
