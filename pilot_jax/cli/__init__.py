"""The command line, with one file for each group of commands. It may import everything but `testing`."""

from __future__ import annotations


def main() -> None:
    """Runs the command line; the entry point of `pilot-jax` and `python -m pilot_jax`."""
    from pilot_jax.cli.app import main

    main()
