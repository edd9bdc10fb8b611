"""Hugging Face checkpoints as pytrees and back: configs, tensor names, files, PEFT adapters, processors.

Imports the modules of `pilot_jax.models`, storage, errors.
"""
