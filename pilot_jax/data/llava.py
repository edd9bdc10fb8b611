"""LLaVA-format instruction data: `id`, `image`, `conversations[{from, value}]`, and `task`, `client`, `split`.

JSON, JSONL, Parquet or a Hugging Face `datasets` folder; the last two need the extra `data`.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import reprlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from pilot_jax.config import LimitsConfig
from pilot_jax.errors import InputError

MOST_NAME = 80  # bytes of a task's or client's name: as a file name it is up to three times as long
LIMITS = LimitsConfig()
SPLITS = ("train", "validation", "test")
SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclasses.dataclass(frozen=True)
class StoredImage:
    """An encoded image inside a table, read when it is needed."""

    table: Any  # datasets.Dataset
    row: int

    def open(self) -> io.BytesIO:
        return io.BytesIO(self.table[self.row]["image"]["bytes"])


@dataclasses.dataclass(frozen=True)
class Sample:
    id: str
    image: Path | Image.Image | StoredImage | None  # None: text only
    turns: tuple[tuple[str, str], ...]  # ("human" | "gpt", text), alternating, ending in "gpt"
    task: str
    client: str
    split: str
    source: str  # file and entry, for messages
    answers: tuple[str, ...] = ()  # several references, as VQA's ten annotators; default: the last answer alone

    @property
    def references(self) -> tuple[str, ...]:
        """What an answer is scored against when the sample is evaluated."""
        return self.answers or (self.turns[-1][1].strip(),)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One raw sample of a file, and what its file's place says where the sample does not."""

    where: str
    value: object
    task: str
    client: str
    split: str


def _lines(file: Path, limits: LimitsConfig) -> Iterator[tuple[str, object]]:
    """The objects of a JSONL file, which is never in memory as a whole."""
    number, most = 0, 100 * limits.text_characters
    with file.open(encoding="utf-8", newline="\n") as lines:
        while line := lines.readline(most):
            number += 1
            if len(line) == most:
                raise InputError(f"{file}:{number}: the line has {most} characters and more. Raise "
                                 "data.limits.text_characters if that is meant.")
            if line.strip():
                try:
                    yield f"{file}:{number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{file}:{number}: not valid JSON ({error}). One object per line.") from None


def _json_values(file: Path, limits: LimitsConfig) -> Iterator[tuple[str, object]]:
    try:
        if file.suffix == ".jsonl":
            yield from _lines(file, limits)
            return
        if file.stat().st_size > limits.file_bytes:
            raise InputError(f"{file}: {file.stat().st_size} bytes, data.limits.file_bytes is {limits.file_bytes}. "
                             "Raise it, or write JSONL, which is not read at once.")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}). data.path needs UTF-8 JSON or JSONL.") from None
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error}).") from None
    if not isinstance(loaded, list):
        raise InputError(f"{file}: a LLaVA file is a JSON list of samples, this is a {type(loaded).__name__}.")
    for index, entry in enumerate(loaded):
        yield f"{file}[{index}]", entry


def _is_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def _files(path: Path) -> list[tuple[Path, str]]:
    """(file, task by its folder or "") of everything `path` names, in order."""
    if path.is_file() or _is_dataset(path):
        return [(path, "")]
    if not path.is_dir():
        return []
    inside = sorted(path.iterdir())
    flat = [(f, "") for f in inside if f.suffix in SUFFIXES]
    nested = [(f, d.name) for d in inside if d.is_dir() and not _is_dataset(d)
              for f in sorted(d.iterdir()) if f.suffix in SUFFIXES]
    return flat + nested


def _defaults(file: Path, folder_task: str, names: str) -> tuple[str, str, str]:
    """(task, client, split) that a file's place gives: `vqa.json`, `vqa_test.json`, `vqa/clinic.json`, `test.json`."""
    match = re.fullmatch(r"(?:(.+)[._-])?(train|validation|val|test)", file.stem)
    stem = (match[1] or "") if match else file.stem
    split = {"val": "validation"}.get(match[2], match[2]) if match else "train"
    if folder_task:
        return folder_task, stem, split
    return (file.parent.name, stem, split) if names == "client" else (stem or file.parent.name, "", split)


def read_entries(path: str | Path, file_names: str = "task", limits: LimitsConfig = LIMITS) -> Iterator[Entry]:
    """The raw samples of a file, of every data file in a folder, or of its `<task>/<client>` files.

    Raises:
        InputError: nothing there, or a file that cannot be parsed.
    """
    path = Path(path).expanduser()
    files = _files(path)
    if not files:
        raise InputError(f"data.path: {path} is neither a data file ({', '.join(SUFFIXES)}) nor a folder that holds "
                         "one.")
    for file, folder_task in files:
        task, client, split = _defaults(file, folder_task, file_names)
        if file.is_dir() or file.suffix == ".parquet":
            from pilot_jax.data.tables import table_values

            for where, value, own_split in table_values(file):
                yield Entry(where, value, task, client, own_split or split)
        else:
            for where, value in _json_values(file, limits):
                yield Entry(where, value, task, client, split)


def _text(where: str, key: str, value: str, limits: LimitsConfig) -> str:
    """The text, if a tokenizer can take it."""
    if len(value) > limits.text_characters:
        raise InputError(f"{where}: {key}: {len(value)} characters, data.limits.text_characters is "
                         f"{limits.text_characters}. Shorten it or raise the limit.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {key}: half a character at {error.start} (a lone surrogate). Mend the "
                         "text.") from None
    return value


def _turns(where: str, raw: object, limits: LimitsConfig) -> tuple[tuple[str, str], ...]:
    if not isinstance(raw, list) or not raw:
        raise InputError(f"{where}: conversations: expected a non-empty list of {{from, value}}.")
    turns = []
    for number, turn in enumerate(raw):
        wanted = ("human", "gpt")[number % 2]
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise InputError(f"{where}: conversations[{number}]: expected {{from, value}} with a text value.")
        if turn.get("from") != wanted:
            raise InputError(f"{where}: conversations[{number}].from: {reprlib.repr(turn.get('from'))}, expected "
                             f"{wanted!r}. Turns alternate, human first.")
        turns.append((wanted, _text(where, f"conversations[{number}]", turn["value"], limits)))
    if turns[-1][0] != "gpt":
        raise InputError(f"{where}: conversations: the last turn must be an answer (from: gpt).")
    return tuple(turns)


def _image(where: str, name: object, image_root: Path, limits: LimitsConfig) -> Path | StoredImage:
    if isinstance(name, StoredImage):
        return name
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{where}: image: {name!r} must be a path inside data.image_root ({image_root}).")
    image = image_root / name
    try:
        there = image.is_file()
        inside = limits.follow_links or image.resolve().is_relative_to(image_root.resolve())
    except (OSError, ValueError, RuntimeError) as error:  # a NUL, a name too long, links in a circle
        raise InputError(f"{where}: image: {name!r} cannot be a file ({error}).") from None
    if not there:
        raise InputError(f"{where}: image: {image} does not exist. Mend the entry or set data.image_root.")
    if not inside:
        raise InputError(f"{where}: image: {image} is a link out of data.image_root ({image_root}). Set "
                         "data.limits.follow_links: true if that is meant.")
    return image


def _name(where: str, key: str, value: object) -> str:
    """A task's or client's name: they become names of files, and are shown."""
    if value is not None and (not isinstance(value, str | int) or isinstance(value, bool)):
        raise InputError(f"{where}: {key}: {value!r} must be a text.")
    name = "" if value is None else str(value)
    if not name.isprintable() or len(name.encode()) > MOST_NAME:
        raise InputError(f"{where}: {key}: {name[:MOST_NAME]!a} has control characters, or more than {MOST_NAME} "
                         "bytes. Choose another name.")
    return name


def parse_sample(entry: Entry, image_root: Path, limits: LimitsConfig = LIMITS) -> Sample:
    """The checked sample.

    Raises:
        InputError: naming file, entry and key.
    """
    where, raw = entry.where, entry.value
    if not isinstance(raw, dict):
        raise InputError(f"{where}: expected an object with id, image and conversations.")
    turns = _turns(where, raw.get("conversations"), limits)
    image = None if raw.get("image") is None else _image(where, raw["image"], image_root, limits)
    marks = [who for who, value in turns for _ in range(value.count("<image>"))]
    if image is not None and marks != ["human"]:
        raise InputError(f"{where}: conversations: <image> must stand once, in a human turn.")
    if image is None and marks:
        raise InputError(f"{where}: the conversation has <image> but the entry has no image.")
    split = raw.get("split") or entry.split
    if not isinstance(split, str) or split not in SPLITS:
        raise InputError(f"{where}: split: {reprlib.repr(split)}, expected one of {', '.join(SPLITS)}.")
    named = {key: _name(where, key, raw.get(key)) or _name(where, key, getattr(entry, key))
             for key in ("task", "client")}
    answers = raw.get("answers") or []
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise InputError(f"{where}: answers: expected a list of texts, the references of the last answer.")
    answers = [_text(where, "answers", a, limits) for a in answers]
    sample_id = raw.get("id")
    if sample_id is not None and not isinstance(sample_id, str | int):
        raise InputError(f"{where}: id: {reprlib.repr(sample_id)} must be a text or a number.")
    return Sample(where if sample_id is None else str(sample_id), image, turns, named["task"], named["client"], split,
                  where, tuple(answers))


def find_image_root(path: str | Path, image_root: str | Path | None) -> Path:
    """`image_root`, or by default `images` beside the data if there is one, else the data's folder."""
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    if image_root is None:
        return folder / "images" if (folder / "images").is_dir() else folder
    root = Path(image_root).expanduser()
    if not root.is_dir():
        raise InputError(f"data.image_root: {root} is not a folder.")
    return root


def read_samples(path: str | Path, image_root: str | Path | None = None, file_names: str = "task",
                 limits: LimitsConfig = LIMITS) -> list[Sample]:
    """All samples that `path` names; see `read_entries` for what that may be and `find_image_root` for the images.

    Raises:
        InputError: naming file, entry and key.
    """
    root = find_image_root(path, image_root)
    samples = [parse_sample(entry, root, limits) for entry in read_entries(path, file_names, limits)]
    if not samples:
        raise InputError(f"{path}: holds no sample.")
    return samples


def write_samples(samples: Iterable[Sample], out: Path) -> int:
    """Write `data.json` and `images/*.png` into the new folder `out`; returns the number of samples.

    The folder appears when it is complete, never before.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out}: exists already. Choose a new folder; nothing was written.")
    partial = out.with_name(out.name + ".partial")
    (partial / "images").mkdir(parents=True, exist_ok=True)
    entries = []
    for sample in samples:
        entry = {"id": sample.id, "task": sample.task, "client": sample.client, "split": sample.split,
                 "conversations": [{"from": who, "value": text} for who, text in sample.turns]}
        if sample.answers:
            entry["answers"] = list(sample.answers)
        if isinstance(sample.image, Image.Image):
            sample.image.save(partial / "images" / f"{sample.id}.png")
            entry["image"] = f"{sample.id}.png"
        entries.append(entry)
    (partial / "data.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    partial.rename(out)
    return len(entries)
