"""Reads YAML strictly: keys that occur twice, files that are too large, and what is no YAML are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pilot_jax.errors import InputError

MOST_BYTES = 1_000_000  # largest size of a config file


class _Loader(yaml.SafeLoader):
    """A loader that refuses a key that occurs twice, of which YAML would take the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"):
            if key in seen:
                raise ValueError(f"the key {key!r} occurs twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, what: str = "config", most: int = MOST_BYTES) -> Any:
    """Returns the content of a YAML file; of an empty one, {}.

    Args:
        what: what the file is, for messages.
        most: largest number of its bytes.

    Raises:
        InputError: the file cannot be read, is too large, is not YAML, or has a key twice.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(most + 1)  # no more, since a device such as /dev/zero has no end
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}). Give the path of a YAML {what}.") from None
    if len(content) > most:
        raise InputError(f"{path}: more than {most} bytes are too many for a {what}. Give the path of a YAML {what}.")
    return parse_yaml(content, path)


def parse_yaml(content: bytes, source: str | Path) -> Any:
    """Returns the content of a YAML text; of an empty one, {}. `source` is the file, for messages.

    Raises:
        InputError: the text is not YAML, or has a key twice.
    """
    try:
        raw = yaml.load(content.decode(), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or an impossible date
        raise InputError(f"{source}: not valid YAML ({error}).") from None
    return {} if raw is None else raw


def parse_value(text: str) -> Any:
    """Returns the value of an override "key=value", which is YAML.

    A text without quotes is taken as it stands: to YAML, what follows " #" is a comment, but a path may have it.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: the value is not YAML, or has a key twice.
    """
    value, text = yaml.load(text, _Loader), text.strip()
    if text.startswith("#") or (isinstance(value, str) and text[0] not in "\"'|>&!*"):
        return text
    return value
