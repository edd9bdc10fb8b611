"""The images that a sample may have, and the check of what an entry says of its image."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import reprlib
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image

from pilot_jax.config import LimitsConfig
from pilot_jax.errors import InputError

LIMITS = LimitsConfig()


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An encoded image in a row of a table; it is read when it is needed."""

    table: Any  # datasets.Dataset
    row: int
    column: str = "image"  # "images": a column of lists, of which the only image is taken

    def open(self) -> io.BytesIO:
        """Returns the encoded image as an open file."""
        cell = self.table[self.row][self.column]
        return io.BytesIO((cell if self.column == "image" else cell[0])["bytes"])


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """An encoded image in memory, such as the content of a file."""

    content: bytes

    def open(self) -> io.BytesIO:
        """Returns the encoded image as an open file."""
        return io.BytesIO(self.content)


@dataclasses.dataclass(frozen=True)
class DrawnImage:
    """A generated image, which is drawn when it is needed."""

    name: str  # differs for images that differ
    draw: Callable[[], Image.Image]


AnyImage = Path | Image.Image | StoredImage | EncodedImage | DrawnImage


def only_image(where: str, raw: Mapping[str, Any], parts: Sequence[object]) -> object:
    """Returns what an entry says of its image: its key `image` or `images`, or the image parts of its messages.

    None: it has no image.

    Args:
        parts: the images in the parts of the entry's messages; None for a part that only marks an image's place.

    Raises:
        InputError: there are several images, which no model of the package takes, or an image part has none.
    """
    found: list[object] = [one for one in parts if one is not None]
    for key in ("image", "images"):
        value = raw.get(key)
        found += list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    if len(found) > 1 or len(parts) > 1:
        raise InputError(f"{where}: {max(len(found), len(parts))} images: several images in a sample are not "
                         "supported. Make a sample of each, or join them into one picture.")
    if parts and not found:
        raise InputError(f"{where}: messages: a part of type image without an image. Add it to the part, or as the key "
                         "image or images.")
    return found[0] if found else None


def checked_image(where: str, value: object, root: Path | None, limits: LimitsConfig) -> AnyImage:
    """Returns an entry's image; files are not opened, but must exist.

    Args:
        value: a path inside `root`; a data URL; the bytes of an image file; an image; or a dict with `bytes` or `path`,
            as Hugging Face's `datasets` has them.
        root: the folder from which paths start; None: any path of this machine may be given.

    Raises:
        InputError: it is none of these, or there is no such file.
    """
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return EncodedImage(value)
    if isinstance(value, Image.Image | StoredImage | EncodedImage | DrawnImage):
        return value
    if isinstance(value, str) and value.startswith("data:"):
        return EncodedImage(_data_url(where, value))
    if isinstance(value, str) and "://" in value:
        raise InputError(f"{where}: image: {reprlib.repr(value)} is an address; nothing is fetched during a run. "
                         "Download the image and give its path.")
    return _file(where, value, root, limits)


def _data_url(where: str, url: str) -> bytes:
    """Returns the content of a data URL (RFC 2397)."""
    head, comma, body = url.partition(",")
    try:
        if not comma:
            raise ValueError("it has no comma")
        content = unquote_to_bytes(body)
        return base64.b64decode(content, validate=True) if head.endswith(";base64") else content
    except (ValueError, binascii.Error) as error:
        raise InputError(f"{where}: image: {reprlib.repr(url)} is not a valid data URL ({error}). Write it "
                         "again.") from None


def _file(where: str, name: object, root: Path | None, limits: LimitsConfig) -> Path:
    """Returns the path of an image, after checking that it is a file, inside `root` if there is one."""
    path = str(name) if isinstance(name, Path) else name
    if not isinstance(path, str) or not path or (
            root is not None and (Path(path).is_absolute() or ".." in Path(path).parts)):
        inside = "a path, an image or the bytes of one" if root is None else f"a path inside data.image_root ({root})"
        raise InputError(f"{where}: image: {name!r} must be {inside}.")
    base = Path() if root is None else root
    # One system writes ä as one character and another as two; a copied folder may have either.
    names = dict.fromkeys((path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)))
    try:
        image = next((base / n for n in names if (base / n).is_file()), None)
        inside_root = image is None or root is None or limits.follow_links or (
            image.resolve().is_relative_to(root.resolve()))
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a name that is too long, or links in a circle
        raise InputError(f"{where}: image: {name!r} cannot be a file ({error}).") from None
    if image is None:
        raise InputError(f"{where}: image: {base / path} does not exist. Correct the entry or set data.image_root.")
    if not inside_root:
        raise InputError(f"{where}: image: {image} is a link out of data.image_root ({root}). If that is right, set "
                         "data.limits.follow_links: true.")
    return image
