"""CLIP, Llama, LoRA and Pilot's connector as Flax Linen modules, decoding, and pretrained models ready to use.

The only folder that imports flax. It knows nothing of clients, rounds or strategies. Imports kernels, storage,
parallel, config, errors.
"""
