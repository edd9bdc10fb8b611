"""The part of benchmarks/accelerator.py that measures torch with PEFT on the same work; run by accelerator_parts.py."""

from __future__ import annotations

import time


class Missing(Exception):
    """Something that a case needs is not there."""


def best_of(run, times: int = 3) -> float:
    """Returns the least seconds of several calls."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


class Torch:
    """Measures torch with PEFT: Llama of the same shape in bfloat16, random token ids, LoRA on all seven linear layers,
    attention of torch's `scaled_dot_product_attention`, logits at the answers alone, fused AdamW."""

    def __init__(self, shape: str) -> None:
        self.shape = shape

    def about(self) -> dict:
        return {}

    def torch_step(self, case: dict) -> dict:
        try:
            import torch
            from peft import LoraConfig, get_peft_model
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError as error:
            raise Missing(f"{error.name} is not installed") from None
        large = self.shape == "7b"
        if large and not torch.cuda.is_available():
            raise Missing("torch sees no GPU")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        sizes = {} if large else {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                                  "num_attention_heads": 4, "vocab_size": 512}
        batch, length, answers = case["batch"], 704 if large else 64, 64 if large else 16
        with torch.device(device):
            torch.set_default_dtype(dtype)
            model = LlamaForCausalLM(LlamaConfig(attn_implementation="sdpa", use_cache=False, **sizes))
            torch.set_default_dtype(torch.float32)
        model.requires_grad_(False)
        names = [f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")]
        model = get_peft_model(model, LoraConfig(r=case["rank"], lora_alpha=2 * case["rank"], target_modules=names))
        if case.get("remat"):
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.data = p.data.float()
        optimizer, llama = torch.optim.AdamW(trained, lr=1e-5, fused=device == "cuda"), model.base_model.model
        ids = torch.randint(10, 500, (batch, length), device=device)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device, dtype, enabled=device == "cuda"):
                hidden = llama.model(input_ids=ids).last_hidden_state[:, -answers - 1:-1]
                logits = llama.lm_head(hidden).float().flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits, ids[:, -answers:].flatten())
            loss.backward()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()

        step()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds, tokens = best_of(step, 4), batch * length
        return {"seconds_per_step": seconds, "tokens_per_second": tokens / seconds, "tokens": tokens,
                "torch": torch.__version__,
                "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None}
