"""Arguments and options that several commands share, and how they become a config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pilot_jax.errors import InputError

if TYPE_CHECKING:
    from pilot_jax.config import Config


def complete_key(incomplete: str) -> list[tuple[str, str]]:
    """Config keys that begin so, for shells."""
    from pilot_jax.config import known_keys

    return [(f"{key}=", text) for key, text in known_keys().items() if text and key.startswith(incomplete)]


ConfigPath = Annotated[Path, typer.Argument(help="YAML config, see configs/.")]
Overrides = Annotated[list[str] | None, typer.Option(
    "--set", help="Override a key: section.key=value. Repeatable.", autocompletion=complete_key)]
RunPath = Annotated[Path, typer.Argument(help="A run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StrategyName = Annotated[str | None, typer.Option(
    "--strategy", help="Instead of --set strategy.name=…: a strategy's name, or module:Class for one of your own, "
                       "whose module is imported.")]
RunStrategy = Annotated[str | None, typer.Option(
    "--strategy", help="For a run whose strategy is your own: module:Class, whose module is imported.")]


def read_config(path: Path, overrides: list[str] | None, strategy: str | None = None) -> Config:
    """The config that a command's arguments describe.

    Raises:
        InputError: the file, a key, a value or the strategy is not known.
    """
    from pilot_jax.config import load_config

    return load_config(path, [*(overrides or []), *([] if strategy is None else [f"strategy.name={strategy}"])])


def check_choice(option: str, value: str, *choices: str) -> None:
    """Raises an `InputError` where the value of an option is none of the choices."""
    if value not in choices:
        *most, last = choices
        raise InputError(f"{option}: {value!r}, expected {', '.join(most)} or {last}.")
