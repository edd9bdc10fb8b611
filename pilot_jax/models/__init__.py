"""CLIP, Llama, LoRA and Pilot's connector as Flax Linen modules, and Hugging Face checkpoints as pytrees.

The only place that imports flax. Knows nothing of clients, rounds or strategies; imports nothing from the rest of
the package but `pilot_jax.errors`.
"""
