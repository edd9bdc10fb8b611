"""Reads and writes Hugging Face checkpoints: configs, tensor names, weights, PEFT adapters, processors.

It imports other modules of `pilot_jax.models`, `storage` and `errors`.
"""
