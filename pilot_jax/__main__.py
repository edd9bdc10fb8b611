"""Runs the command line: `python -m pilot_jax` is the same as `pilot-jax`."""

from pilot_jax.cli import main

main()
