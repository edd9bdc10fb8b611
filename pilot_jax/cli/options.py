"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def complete_key(incomplete: str) -> list[tuple[str, str]]:
    """Config keys that begin so, for shells."""
    from pilot_jax.config import known_keys

    return [(f"{key}=", text) for key, text in known_keys().items() if text and key.startswith(incomplete)]


ConfigPath = Annotated[Path, typer.Argument(help="YAML config, see configs/.")]
Overrides = Annotated[list[str] | None, typer.Option(
    "--set", help="Override a key: section.key=value. Repeatable.", autocompletion=complete_key)]
RunPath = Annotated[Path, typer.Argument(help="A run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
