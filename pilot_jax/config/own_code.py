"""Imports a user's own modules, which register metrics and other pieces that a config can then name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

from pilot_jax.errors import InputError


def import_own(module: str, source: str) -> ModuleType:
    """Returns the module of a name that the user gave; it is also searched for in the working directory.

    Args:
        source: what named it, for the message.

    Raises:
        InputError: there is no such module, or it cannot be imported.
    """
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{source}: cannot be imported ({error}). Run it from the folder of {module}.py, or install "
                         "the package that has it.") from None


def use_modules(names: list[str] | None) -> list[str] | None:
    """Imports the modules of the option --use, and returns their names."""
    for name in names or []:
        module = name.removesuffix(".py")
        if not all(part.isidentifier() for part in module.split(".")):
            raise InputError(f"--use: {name!r} is not the name of a module. For a file mine.py in this folder, give "
                             "--use mine.")
        import_own(module, f"--use {name}")
    return names
