"""Reads and checks configs from YAML files and overrides; error messages name the key and the nearest known one."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pilot_jax.config.schema import STRATEGY_PARAMS, Config, StrategyParams, strategies
from pilot_jax.config.strict_yaml import parse_value, read_yaml
from pilot_jax.errors import InputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# The keys that are meant by names that other tools have for them.
MEANT = dict.fromkeys(("learning_rate", "lr"), "train.lr_connector, train.lr_lora_stage1 or train.lr_lora_stage2") | {
    "epochs": "federation.local_epochs", "num_epochs": "federation.local_epochs",
    "num_train_epochs": "federation.local_epochs", "max_steps": "federation.local_steps",
    "num_rounds": "federation.rounds", "num_clients": "federation.clients",
    "fraction_fit": "federation.clients_per_round", "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.microbatch", "max_grad_norm": "train.clip_norm",
    "warmup_ratio": "train.warmup", "lr_scheduler_type": "train.schedule", "optim": "train.optimizer",
    "lora_r": "model.lora.rank", "r": "model.lora.rank", "lora_alpha": "model.lora.alpha",
    "target_modules": "model.lora.targets", "max_seq_length": "data.max_length",
    "model_max_length": "data.max_length", "model_name_or_path": "model.path", "data_path": "data.path",
    "image_folder": "data.image_root", "image_aspect_ratio": "data.image_fit", "report_to": "system.wandb",
    "output_dir": "the option --out"}
_Model = TypeVar("_Model", bound=BaseModel)
_Settings = TypeVar("_Settings", bound="DataclassInstance")


def known_keys(model: type[BaseModel] | None = None, prefix: str = "") -> dict[str, str]:
    """Returns every "section.key" with its description; a section without a description of its own has an empty one.

    Args:
        model: the class of the section to list; None: the whole config, with the keys of all strategies.
        prefix: the text that is put before each key.
    """
    keys: dict[str, str] = {}
    for name, field in (model or Config).model_fields.items():
        keys[prefix + name] = field.description or ""
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys |= known_keys(kind, f"{prefix}{name}.")
    if model is None:
        strategies()
        for params in STRATEGY_PARAMS.values():
            keys |= known_keys(params, "strategy.")
    return keys


def json_schema() -> dict[str, Any]:
    """Returns the JSON schema of a config, with which editors complete and check config files.

    Its property `strategy` is a choice among the sections of all registered strategies.
    """
    strategies()
    schema = Config.model_json_schema()
    sections = []
    for name, params in STRATEGY_PARAMS.items():
        own = params.model_json_schema()
        schema["$defs"] |= own.pop("$defs", {})
        own["properties"]["name"] |= {"const": name}
        own["required"] = [] if name == StrategyParams.model_fields["name"].default else ["name"]
        sections.append(own | {"title": name})
    schema["properties"]["strategy"] = {"oneOf": sections}
    schema["properties"]["base"] = {"type": "string", "description": "Path of another config, whose keys this one "
                                    "changes and adds to; it starts from this file's folder."}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "pilot-jax config"}


def _message(error: Mapping[str, Any], source: str) -> str:
    """Returns the message for one of pydantic's errors; `source` is the file, or where else the config comes from."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{source}: {key}: unknown key.{nearest(key)}"
    return f"{source}: {key}: {error['msg']} (got {reprlib.repr(error.get('input'))})."


def _validated(model: type[_Model], raw: Any, source: str, section: tuple[str, ...] = ()) -> _Model:
    """Returns `raw` as a checked `model`; `section` is the path of the model's section inside the config."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise InputError("\n".join(_message({**e, "loc": (*section, *e["loc"])}, source)
                                   for e in error.errors())) from None


def parse_strategy(raw: Any, source: str = "config") -> StrategyParams:
    """Returns the checked section `strategy`, an object of the class that its key `name` chooses.

    Keys that belong to other strategies are checked and then left out, so that one config serves several strategies.

    Raises:
        InputError: the strategy is not known, or a key or value is wrong.
    """
    if isinstance(raw, StrategyParams):
        return raw
    if not isinstance(raw, dict):
        raise InputError(f"{source}: strategy: expected a mapping, this is a {type(raw).__name__}.")
    name = raw.get("name", StrategyParams.model_fields["name"].default)
    params = strategies().params_of(name, source)
    foreign = {key: other for other in STRATEGY_PARAMS.values() for key in other.model_fields
               if key in raw and key not in params.model_fields}
    for key, other in foreign.items():
        _validated(other, {key: raw[key]}, source, ("strategy",))
    return _validated(params, {k: v for k, v in raw.items() if k not in foreign} | {"name": name}, source,
                      ("strategy",))


def _refuse_nul(node: Any, source: str, key: str = "") -> None:
    """Raises an InputError for a text with a NUL character, which no file name may have."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            _refuse_nul(value, source, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list | tuple):
        for value in node:
            _refuse_nul(value, source, key)
    elif isinstance(node, str) and "\0" in node:
        raise InputError(f"{source}: {key}: the text has a NUL character. Remove it.")


def parse_config(raw: Any, source: str = "config") -> Config:
    """Returns the checked `Config` that nested dicts describe.

    Raises:
        InputError: a key or value is wrong; the message names the key and, for a misspelling, the nearest known one.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{source}: a config is a mapping of sections, this is a {type(raw).__name__}.")
    config = _validated(Config, {**raw, "strategy": parse_strategy(raw.get("strategy", {}), source)}, source)
    # Not `raw`: aliases of YAML can make that exponentially large.
    _refuse_nul(config.model_dump(mode="json"), source)
    return config


def _with_base(raw: Any, path: Path, chain: tuple[Path, ...] = ()) -> Any:
    """Returns a config's raw sections with those of the file that its key `base` names below them.

    Raises:
        InputError: a file names itself as its base, directly or through others, or is no config.
    """
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a config is a mapping of sections, this is a {type(raw).__name__}.")
    if "base" not in raw:
        return raw
    name, own = raw["base"], {key: value for key, value in raw.items() if key != "base"}
    if not isinstance(name, str):
        raise InputError(f"{path}: base: expected the path of another config, got {reprlib.repr(name)}.")
    base, chain = (path.parent / name).resolve(), (*chain, path.resolve())
    if base in chain:
        raise InputError(f"{path}: base: {name} has this file as its base in turn. Remove one of the two keys.")
    below, section = _with_base(read_yaml(base), base, chain), own.get("strategy")
    old = below.get("strategy", {})
    if isinstance(section, dict) and isinstance(old, dict) and section.get("name", old.get("name")) != old.get("name"):
        strategies()  # fills STRATEGY_PARAMS
        below = {**below, "strategy": _without_defaults(old)}  # another strategy, whose defaults are its own
    return _merged(below, own)


def _merged(below: Any, above: Any) -> Any:
    """Returns nested dicts with the values of `above`, and those of `below` where it has none."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{key: _merged(below[key], value) if key in below else value for key, value in above.items()}}


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a config from a YAML file. Its key `base` can name another one, whose keys it changes and adds to.

    Args:
        overrides: texts "section.key=value", with a YAML value, that replace or add keys.

    Raises:
        InputError: the file cannot be read or is not YAML, or a key or value is wrong.
    """
    raw = _with_base(read_yaml(path), Path(path))
    return parse_config(_overridden(raw, overrides or []), str(path))


def differences(old: Config, new: Config) -> list[str]:
    """Returns a text "section.key: old → new" for every key in which two configs differ."""
    def leaves(node: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(node, dict) or not node:
            return {prefix[:-1]: node}
        return {k: v for name, value in node.items() for k, v in leaves(value, f"{prefix}{name}.").items()}

    before, after = leaves(old.model_dump(mode="json")), leaves(new.model_dump(mode="json"))
    return [f"{key}: {before.get(key)!r} → {after.get(key)!r}" for key in {**before, **after}
            if before.get(key) != after.get(key)]


def apply_overrides(config: Config, overrides: list[str]) -> Config:
    """Returns the config with the value of every override "section.key=value", checked again."""
    return parse_config(_overridden(config.model_dump(mode="json"), overrides), "config")


def _overridden(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Writes every override "section.key=value" into `raw`, and returns it."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise InputError(f"--set {override}: expected section.key=value.")
        _refuse_unknown(key, override)
        if key == "strategy.name":
            strategies()  # fills STRATEGY_PARAMS
            raw["strategy"] = _without_defaults(raw.get("strategy", {}))
        node = raw
        *parents, leaf = key.split(".")
        for parent in parents:
            if not isinstance(node.setdefault(parent, {}), dict):
                raise InputError(f"--set {override}: {parent} is not a section.")
            node = node[parent]
        try:
            node[leaf] = parse_value(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"--set {override}: the value is not valid YAML ({error}).") from None
        if key == "strategy.name" and ":" in value:  # the user named the module, not a file: it may be imported
            strategies().use(value)
    return raw


def _refuse_unknown(key: str, override: str) -> None:
    """Raises an `InputError` for an override of a key that does not exist, which names the nearest one.

    Entries of mappings, such as eval.metrics.vqa, and keys of strategies, of which a later override may choose another
    one, are checked with the whole config.
    """
    if key.startswith("strategy.") or key in known_keys() or key.startswith(tuple(f"{one}." for one in _mappings())):
        return
    raise InputError(f"--set {override}: {key}: unknown key.{nearest(key)}")


def _mappings(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Returns the keys whose value maps names, such as those of clients, to values."""
    found = []
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        found += [prefix + name] if any(get_origin(kind) is dict for kind in kinds) else []
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found += _mappings(kind, f"{prefix}{name}.")
    return found


def nearest(key: str) -> str:
    """Returns the end of a message about an unknown key: which one may be meant."""
    known = list(known_keys())
    leaf = key.rsplit(".", 1)[-1]
    if leaf in MEANT:
        return f" Did you mean {MEANT[leaf]}?"
    leaves = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}  # of equal ones, the first
    near = [leaves[leaf]] if leaf in leaves else difflib.get_close_matches(key, known, 1, 0.6)
    near = near or [leaves[k] for k in difflib.get_close_matches(leaf, leaves, 1, 0.6)]
    return f" Did you mean '{near[0]}'?" if near else " `pilot-jax schema` prints the known keys."


def _without_defaults(section: Any) -> Any:
    """Returns a section `strategy` without the keys that have their defaults, so that it can get another name.

    A strategy can have another default for a key that all have, such as `combine`.
    """
    name = section.get("name", StrategyParams.model_fields["name"].default) if isinstance(section, dict) else None
    if not isinstance(name, str) or name not in STRATEGY_PARAMS:
        return section
    return {"name": name} | _unlike(section, STRATEGY_PARAMS[name]().model_dump(mode="json"))


def _unlike(section: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a section that differ from their defaults, of a section within it likewise."""
    out = {}
    for key, value in section.items():
        inner = isinstance(value, dict) and isinstance(defaults.get(key), dict)
        kept = _unlike(value, defaults[key]) if inner else value
        if key not in defaults or kept != ({} if inner else defaults[key]):
            out[key] = kept
    return out


def read_settings(path: str | Path, settings: type[_Settings]) -> _Settings:
    """Reads a dataclass of positive numbers and texts, all with defaults, from a YAML file that maps fields to values.

    Raises:
        InputError: the file cannot be read, or has an unknown key, or a value that is not a positive number or a text.
    """
    raw = read_yaml(path)
    known = {f.name: type(f.default) for f in dataclasses.fields(settings)}
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a mapping with the keys {', '.join(known)}.")
    for key, value in raw.items():
        if key not in known:
            raise InputError(f"{path}: {key}: unknown key. Known: {', '.join(known)}.")
        if known[key] is str:
            if not isinstance(value, str):
                raise InputError(f"{path}: {key}: expected a text, got {value!r}.")
            continue
        numbers = (int,) if known[key] is int else (int, float)
        is_number = isinstance(value, numbers) and not isinstance(value, bool)
        if not is_number or not (0 < value < float("inf") or (value == 0 and key == "seed")):
            raise InputError(f"{path}: {key}: expected a positive {known[key].__name__}, got {value!r}.")
    return settings(**raw)
