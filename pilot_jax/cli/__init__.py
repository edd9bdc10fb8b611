"""The command line, a file a group of commands. May import everything but `testing`."""

from __future__ import annotations


def main() -> None:
    """Entry point of `pilot-jax` and `python -m pilot_jax`."""
    from pilot_jax.cli.app import main

    main()
