"""Data: LLaVA JSON, conversations, images and their cached features, partitions, batches, and the digit scenes.

Knows nothing of strategies. May import `pilot_jax.errors`, `pilot_jax.models` (for features) and libraries.
"""
