"""`python -m pilot_jax` is `pilot-jax`."""

from pilot_jax.cli import main

main()
