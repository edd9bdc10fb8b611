"""CLIP, Llama, LoRA and Pilot's connector as Flax Linen modules, decoding, and pretrained models ready to use.

This is the only folder that imports flax. Its code knows no rounds and no strategies. It imports `kernels`, `storage`,
`parallel`, `config` and `errors`.
"""
