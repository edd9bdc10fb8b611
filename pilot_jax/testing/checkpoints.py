"""Writers of tiny checkpoints with random weights, as transformers writes them: LLaVA and language models.

They need torch, transformers and tokenizers (the extra `dev`), which are imported when a writer is called.

    from pilot_jax.testing.checkpoints import write_checkpoint
    write_checkpoint("tiny")  # a folder for `model.path`
"""

from __future__ import annotations

TINY_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
             "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TINY_VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
               "image_size": 16, "patch_size": 8}
IMAGE_TOKEN = 5


def _randomise(model):
    """Gives a torch model random weights: random biases and norms too, so that a mix-up shows."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.3 if parameter.ndim == 1 else 0.15
            parameter.copy_(torch.randn_like(parameter) * std + (1.0 if "norm" in name and "weight" in name else 0.0))


def write_language_model(folder, *, chat_template=None, **text):
    """Writes a random language model with its tokenizer, for `model.parts.language`, and returns the torch model.

    `text` overrides the tiny shapes; `model_type` chooses the family (default Llama).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    raw = {"model_type": "llama"} | TINY_TEXT | {"vocab_size": 400} | text
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw)).eval()
    _randomise(model)
    model.save_pretrained(folder)
    assert len(write_tokenizer(folder, chat_template=chat_template, image=False)) <= raw["vocab_size"]
    return model


def write_llava(folder, *, vision=None, text=None, **options):
    """Writes a random LLaVA checkpoint by transformers and returns the torch model.

    `vision` and `text` override the tiny shapes; their `model_type` chooses the family (default CLIP and Llama).
    """
    import torch
    from transformers import AutoConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    save = options.pop("save", {})
    parts = {"vision_config": {"model_type": "clip_vision_model"} | TINY_VISION | (vision or {}),
             "text_config": {"model_type": "llama"} | TINY_TEXT | (text or {})}
    options |= {name: AutoConfig.for_model(**raw).to_dict() for name, raw in parts.items()}
    config = LlavaConfig(image_token_index=IMAGE_TOKEN, **options)
    model = LlavaForConditionalGeneration(config).eval()
    _randomise(model)
    model.to(save.pop("dtype", torch.float32)).save_pretrained(folder, **save)
    if model.dtype != torch.float32:  # model.float() would leave the rotary buffers rounded
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def write_tokenizer(folder, *, size=400, chat_template=None, image=True):
    """Writes a small byte-level BPE tokenizer that puts a BOS first, as Llama's does, and returns it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", *(["<image>"] if image else ["<spare>"]), "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["USER: what is the colour of the cat? ASSISTANT: the cat is red. How many? two, I think."] * 4
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                   pad_token="<pad>", chat_template=chat_template)
    fast.save_pretrained(folder)
    return fast


def write_checkpoint(folder, *, chat_template=None, **options):
    """Calls `write_llava` and adds the tokenizer and image processor of a downloaded checkpoint; returns the model."""
    from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

    text = {"vocab_size": 400} | options.pop("text", {})
    model = write_llava(folder, text=text, **options)
    assert len(write_tokenizer(folder, chat_template=chat_template)) <= text["vocab_size"]
    side = model.config.vision_config.image_size
    if model.config.vision_config.model_type == "clip_vision_model":
        CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}
                              ).save_pretrained(folder)
    else:
        SiglipImageProcessorPil(size={"height": side, "width": side}).save_pretrained(folder)
    return model
