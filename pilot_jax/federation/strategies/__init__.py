"""Federated algorithms, one file each with citation, parameters and rule. They import only what lies below `rounds.py`.

To add one, put a file with a subclass of `base.Strategy` under `@register("its_name")` into this folder. A class
outside the package is named "module:Class"; a config file alone never causes its import (`params_of`).
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import pkgutil
from typing import Any

from pilot_jax.config import STRATEGY_PARAMS, StrategyParams, import_own, parse_strategy
from pilot_jax.errors import InputError
from pilot_jax.federation.strategies.base import STRATEGIES, Strategy, name_of, register

__all__ = ["STRATEGIES", "Strategy", "make_strategy", "name_of", "params_of", "register", "use"]

ENTRY_POINTS = "pilot_jax.strategies"  # the group in which installed packages name their strategies

for _module in sorted(module.name for module in pkgutil.iter_modules(__path__)):
    importlib.import_module(f"{__name__}.{_module}")


def params_of(name: object, source: str = "config") -> type[StrategyParams]:
    """Returns the class that checks the config section `strategy`, for a strategy's name.

    A name that is neither the package's, nor registered in this process, nor an installed entry point is refused:
    a config may come from somebody else, and must not decide which code is imported.

    Raises:
        InputError: the name is not known.
    """
    if isinstance(name, str) and (name in STRATEGY_PARAMS or _installed(name)):
        return STRATEGY_PARAMS[name]
    if isinstance(name, str) and ":" in name:
        raise InputError(f"{source}: strategy.name: {name} is not of this package, and a file alone imports no code. "
                         f"If you trust that module, name it: --strategy {name} (in Python: pass the strategy).")
    near = difflib.get_close_matches(str(name), STRATEGIES, 1, 0.6)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(STRATEGIES)}."
    raise InputError(f"{source}: strategy.name: {name!r} is not a strategy. {hint} For your own, give module:Class.")


def _installed(name: str) -> bool:
    """Whether an installed package has an entry point with this name or value, whose class is then registered."""
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if name in (point.name, point.value):
            _registered(name, point.load())
            return True
    return False


def _registered(name: str, strategy: Any) -> type[Strategy]:
    if not (isinstance(strategy, type) and issubclass(strategy, Strategy)):
        raise InputError(f"strategy.name: {name} is not a subclass of pilot_jax.Strategy.")
    return register(name)(strategy)


def use(strategy: str | type[Strategy] | Strategy) -> str:
    """Registers a user's own strategy and returns its name.

    `strategy` is a class, an object or "module:Class". Modules are also searched for in the working directory.

    Raises:
        InputError: there is no such module or class, or it is no strategy.
    """
    if not isinstance(strategy, str):
        kind = strategy if isinstance(strategy, type) else type(strategy)
        name = name_of(kind)
        _registered(name, kind)
        return name
    if strategy in STRATEGIES:
        return strategy
    module, colon, name = strategy.partition(":")
    if not colon:
        params_of(strategy, "--strategy")
        return strategy
    found: Any = import_own(module, f"strategy.name: {strategy}")
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise InputError(f"strategy.name: {strategy}: the module {module} has no {name}.")
    _registered(strategy, found)
    return strategy


def make_strategy(name: str | StrategyParams, params: dict[str, Any] | None = None,
                  schedule: str = "first_time") -> Strategy:
    """Returns the strategy that a name and the keys of its config section describe, or the section itself."""
    section = name if isinstance(name, StrategyParams) else parse_strategy({"name": name, **(params or {})})
    return STRATEGIES[section.name](section, schedule)
