"""The federation: ownership, losses, local updates, mixing, strategies, rounds. Pure functions of pytrees.

Imports `pilot_jax.models` and, in `simulation`, `pilot_jax.data` and `pilot_jax.evaluation`.
"""
