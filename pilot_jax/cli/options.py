"""Arguments and options that several commands share, and the function that makes a config of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pilot_jax.errors import InputError

if TYPE_CHECKING:
    from pilot_jax.config import Config


def complete_key(incomplete: str) -> list[tuple[str, str]]:
    """Returns the config keys that begin with `incomplete`, for completion in the shell."""
    from pilot_jax.config import known_keys

    return [(f"{key}=", text) for key, text in known_keys().items() if text and key.startswith(incomplete)]


def complete_client(context: typer.Context, incomplete: str) -> list[str]:
    """Returns the clients of the run directory on the command line that begin with `incomplete`."""
    from pilot_jax.runs.listing import client_names

    folder = context.params.get("run_dir")
    return [] if folder is None else [name for name in client_names(Path(folder)) if name.startswith(incomplete)]


def complete_strategy(incomplete: str) -> list[str]:
    """Returns the strategies that begin with `incomplete`; of a list with commas, its last entry is completed."""
    from pilot_jax.federation.strategies import STRATEGIES

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in STRATEGIES if name.startswith(last)]


ConfigPath = Annotated[Path, typer.Argument(help="YAML config; the folder configs/ has examples.")]
Overrides = Annotated[list[str] | None, typer.Option(
    "--set", help="Config key to set, such as eval.every=2 (section.key=value). Can be repeated.",
    autocompletion=complete_key)]
RunPath = Annotated[Path, typer.Argument(help="Run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
StrategyName = Annotated[str | None, typer.Option(
    "--strategy", autocompletion=complete_strategy, help="Strategy to use instead of the config's: a name, or "
    "module:Class for a class of your own. That module is imported.")]
RunStrategy = Annotated[str | None, typer.Option(
    "--strategy", help="Strategy of the run, as module:Class, if it is a class of your own. Its module is imported.")]


def _import_modules(names: list[str] | None) -> list[str] | None:
    if not names:  # also while the shell completes
        return names
    from pilot_jax.config import use_modules

    return use_modules(names)


Use = Annotated[list[str] | None, typer.Option(
    "--use", callback=_import_modules, is_eager=True, help="Module of your own to import first, which registers "
    "metrics or strategies that the config names. Can be repeated.")]


def read_config(path: Path, overrides: list[str] | None, strategy: str | None = None) -> Config:
    """Returns the config in the file `path`, with the keys of `--set` and the strategy of `--strategy`.

    Raises:
        InputError: the file cannot be read, or a key, a value or the strategy is wrong.
    """
    from pilot_jax.config import load_config

    return load_config(path, [*(overrides or []), *([] if strategy is None else [f"strategy.name={strategy}"])])


def with_choices(config: Config, say: Callable[[str], None] | None) -> Config:
    """Returns the config with the choices that it leaves to the device; `say` is given the line that says which.

    Raises:
        InputError: by `plan`, the run does not fit an accelerator. Nothing is loaded before.
    """
    from pilot_jax.planning.choices import chosen, this_device
    from pilot_jax.runs.prepare import leaves_choices

    device = this_device()
    if device.platform == "cpu" and not leaves_choices(config):
        return config
    config, line = chosen(config, device)
    if say is not None:
        say(line)
    return config


def check_choice(option: str, value: str, *choices: str) -> None:
    """Raises an `InputError` if the value of an option is none of the choices."""
    if value not in choices:
        *most, last = choices
        raise InputError(f"{option}: {value!r}, expected {', '.join(most)} or {last}.")
