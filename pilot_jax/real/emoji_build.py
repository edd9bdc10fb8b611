"""Builds the emoji set from four npm packages: `python -m pilot_jax.real.emoji_build FOLDER_WITH_TARBALLS OUT`.

`npm pack emojibase-data@17.0.0 emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
@lobehub/fluent-emoji-3d@1.1.0` writes the tarballs. They are read in memory: nothing is unpacked, and a tarball with
another checksum is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pilot_jax.errors import InputError
from pilot_jax.files import new_folder
from pilot_jax.real.emoji import ASSETS, LANGUAGES, POOLS, STYLES, checksum
from pilot_jax.real.emoji_colours import main_colours
from pilot_jax.real.emoji_kinds import ALSO, GROUPS, LEFT_OUT, MOVED, SUBGROUPS, inverse, table
from pilot_jax.real.tarballs import Tarball, read_members

WORDS = Tarball("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
PICTURES = {
    "noto": (Tarball("emoji-datasource-google", "16.0.0",
                     "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"), "package/img/google/64/"),
    "twemoji": (Tarball("emoji-datasource-twitter", "16.0.0",
                        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"),
                "package/img/twitter/64/"),
    "fluent": (Tarball("@lobehub/fluent-emoji-3d", "1.1.0",
                       "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"), "package/assets/"),
}
SIDE, MARGIN, PALETTE = 56, 3, 128  # pixels, pixels, colours of a stored picture
SHORTCODES = ("github", "joypixels")  # lists of other English names
OWN_KIND = 10  # weight of the shares of a kind, against the shares of all concepts


def code_points(name: str) -> str:
    """Returns a concept's key from a hexadecimal name as the packages have it: without variation selectors."""
    return "-".join(part.lstrip("0") for part in name.lower().split("-") if part != "fe0f")


# -- words -------------------------------------------------------------------------------------------------------------


def read_words(folder: Path, tarball: Tarball = WORDS) -> dict[str, Any]:
    """Returns emojibase's files that the set is made of, by name, parsed.

    Raises:
        InputError: see `tarballs.read_members`; or a file is missing or no JSON.
    """
    names = {"groups": "meta/groups", "en": "en/data", **{code: f"{code}/data" for code in LANGUAGES},
             **{code: f"en/shortcodes/{code}" for code in SHORTCODES}}
    found = read_members(folder, tarball, [f"package/{name}.json" for name in names.values()].__contains__)
    out = {}
    for short, name in names.items():
        member = f"package/{name}.json"
        if member not in found:
            raise InputError(f"{folder / tarball.file}: has no {member}. Download it again: {tarball.command}.")
        try:
            out[short] = json.loads(found[member])
        except ValueError as error:
            raise InputError(f"{folder / tarball.file}: {member}: not valid JSON ({error}). Download it again: "
                             f"{tarball.command}.") from None
    return out


def choose(words: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the concepts, before colours and pools are known: emojibase's emoji that show a thing, in its order."""
    kind_of = {subgroup: kind for kind, subgroups in SUBGROUPS.items() for subgroup in subgroups}
    moved, groups = inverse(MOVED), inverse(GROUPS)
    left_out = {emoji for emojis in table(LEFT_OUT).values() for emoji in emojis}
    also = {kind: set(emojis) for kind, emojis in table(ALSO).items()}
    translated = {code: {one["hexcode"]: one["label"] for one in words[code]} for code in LANGUAGES}
    subgroup_names = words["groups"]["subgroups"]
    out = []
    for entry in words["en"]:
        label, code = entry["label"], entry["hexcode"]
        kind = moved.get(label, kind_of.get(subgroup_names.get(str(entry.get("subgroup")), "")))
        variant = label.startswith(("man ", "woman ", "men ", "women ")) or label.endswith(": facing right")
        if kind is None or variant or label in left_out:
            continue
        kinds = [] if kind == "none" else [kind, *(k for k, emojis in also.items() if label in emojis and k != kind)]
        name = label.replace("’", "'")
        if kind in ("mammal", "reptile"):
            name = name.removesuffix(" face")
        codes = [found if isinstance(found, list) else [found]
                 for found in (words[source].get(code, []) for source in SHORTCODES)]
        others = [other.replace("_", " ") for found in codes for other in found]
        out.append({
            "key": code_points(code), "name": name, "names": _words([label.replace("’", "'"), *others], {name}),
            "kinds": kinds, "group": groups.get(label, label), "pool": "",
            "keywords": _words(entry.get("tags", ()), {name}),
            "translations": {c: translated[c][code] for c in LANGUAGES if code in translated[c]}, "colours": {}})
    return out


def _words(texts: Iterable[str], without: set[str]) -> list[str]:
    """Returns the texts that are words of letters, each once; shortcodes and keywords have some that are not."""
    return [text for text in dict.fromkeys(texts)
            if text not in without and re.fullmatch(r"[^\W\d_][^\W\d_ '.-]*(?:[ '.-]+[^\W\d_]+)*\.?", text)]


def assign_pools(concepts: list[dict[str, Any]]) -> None:
    """Puts every group of concepts into a pool: kind by kind, large groups first, then by the SHA-256 of their names.

    Each group goes to the pool that lacks most of its share of the kind and of all concepts so far, so that every kind
    is in the pools in nearly the same shares. A group has the kind of its first concept.
    """
    groups: dict[str, tuple[str, int]] = {}
    for one in concepts:
        kind, size = groups.get(one["group"], ((one["kinds"] or ["none"])[0], 0))
        groups[one["group"]] = kind, size + 1
    order = sorted(groups, key=lambda g: (groups[g][0], -groups[g][1], hashlib.sha256(g.encode()).hexdigest()))
    pools: dict[str, str] = {}
    every: Counter[str] = Counter()  # concepts by pool
    own: Counter[tuple[str, str]] = Counter()  # by kind and pool
    seen: Counter[str] = Counter()  # by kind
    for group in order:
        kind, size = groups[group]
        seen[kind] += size
        lacks = {pool: share * (OWN_KIND * seen[kind] + seen.total()) - OWN_KIND * own[kind, pool] - every[pool]
                 for pool, share in POOLS.items()}
        pools[group] = best = max(lacks, key=lacks.__getitem__)
        every[best] += size
        own[kind, best] += size
    for one in concepts:
        one["pool"] = pools[one["group"]]


# -- pictures ----------------------------------------------------------------------------------------------------------


def read_pictures(folder: Path, style: str, sources: dict[str, tuple[Tarball, str]] = PICTURES) -> dict[str, bytes]:
    """Returns the encoded pictures of a style by concept key."""
    tarball, prefix = sources[style]
    members = read_members(folder, tarball, lambda name: name.startswith(prefix) and name.endswith((".png", ".webp")))
    return {code_points(name.removeprefix(prefix).rsplit(".", 1)[0]): data for name, data in members.items()}


def decoded(data: bytes, where: str) -> Image.Image:
    """Returns a picture as RGBA.

    Raises:
        InputError: it cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "WEBP"]) as image:
            return image.convert("RGBA")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{where}: not a picture ({error}). Download the packages again.") from None


def on_white(image: Image.Image, side: int = SIDE) -> Image.Image:
    """Returns a picture of `side` pixels: composed on white, resized, with a margin, of at most `PALETTE` colours."""
    page = Image.new("RGBA", image.size, "white")
    page.alpha_composite(image)
    margin = round(side * MARGIN / SIDE)
    canvas = Image.new("RGB", (side, side), "white")
    inner = side - 2 * margin
    canvas.paste(page.convert("RGB").resize((inner, inner), Image.Resampling.LANCZOS), (margin, margin))
    return canvas.quantize(PALETTE, dither=Image.Dither.NONE)


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def _write_archive(file: Path, members: dict[str, bytes]) -> None:
    """Writes a zip file that is the same whenever it is written."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)


# -- the set -----------------------------------------------------------------------------------------------------------


def build(folder: Path, out: Path, *, side: int = SIDE, words: Tarball = WORDS,
          sources: dict[str, tuple[Tarball, str]] = PICTURES) -> int:
    """Writes the set into the new folder `out` and returns the number of its concepts.

    Args:
        folder: the folder with the tarballs.
        side: width and height of the pictures.
        words, sources: the tarballs with their checksums.

    Raises:
        InputError: a tarball is missing, wrong or incomplete, or `out` exists.
    """
    if out.exists():
        raise InputError(f"{out}: exists already. Choose a new folder; nothing was written.")
    candidates = choose(read_words(folder, words))
    found = {style: read_pictures(folder, style, sources) for style in STYLES}
    concepts = [one for one in candidates if all(one["key"] in found[style] for style in STYLES)]
    if not concepts:
        raise InputError(f"{folder}: no emoji is in all of the tarballs. Download them again.")
    archives: dict[str, dict[str, bytes]] = {}
    for style in STYLES:
        archives[style] = {}
        for one in concepts:
            image = decoded(found[style][one["key"]], f"{folder / sources[style][0].file}: {one['key']}")
            one["colours"][style] = list(main_colours(np.asarray(image)))
            archives[style][f"{one['key']}.png"] = _png(on_white(image, side))
    assign_pools(concepts)
    with new_folder(out) as partial:
        for style, members in archives.items():
            _write_archive(partial / f"{style}.zip", members)
        lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in concepts)
        (partial / "concepts.json").write_text(f'{{"concepts": [\n{lines}\n]}}\n', encoding="utf-8")
        shutil.copy(ASSETS / "NOTICE", partial)
    return len(concepts)


def main(report: Callable[[str], None] = print) -> None:
    """Builds the set from the command line."""
    parser = argparse.ArgumentParser(description="Builds the emoji set from four npm packages.")
    parser.add_argument("folder", type=Path, help="folder with the tarballs that `npm pack` wrote")
    parser.add_argument("out", type=Path, help="new folder for the set")
    parser.add_argument("--side", type=int, default=SIDE, help="width and height of the pictures")
    args = parser.parse_args()
    try:
        count = build(args.folder, args.out, side=args.side)
    except InputError as error:
        parser.error(str(error))
    same = checksum(args.out) == checksum()
    report(f"{count} concepts in {args.out}; {'the same as' if same else 'not the same as'} the set of the package")


if __name__ == "__main__":
    main()
