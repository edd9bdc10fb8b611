"""LLaVA-format instruction data: `id`, `image`, `conversations[{from, value}]`, and `task`, `client`, `split`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from pilot_jax.errors import InputError

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Sample:
    id: str
    image: Path | Image.Image | None  # None: text only
    turns: tuple[tuple[str, str], ...]  # ("human" | "gpt", text), alternating, ending in "gpt"
    task: str
    client: str
    split: str
    source: str  # file and entry, for messages

    @property
    def answer(self) -> str:
        """The last answer: the reference when the sample is evaluated."""
        return self.turns[-1][1].strip()


def _entries(file: Path) -> Iterator[tuple[str, object]]:
    """(where, object) for each entry of a JSON list or JSONL file."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}). data.path needs UTF-8 JSON or JSONL.") from None
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    yield f"{file}:{number}", json.loads(line)
                except ValueError as error:
                    raise InputError(f"{file}:{number}: not valid JSON ({error}). One object per line.") from None
        return
    try:
        loaded = json.loads(text)
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error}).") from None
    if not isinstance(loaded, list):
        raise InputError(f"{file}: a LLaVA file is a JSON list of samples, this is a {type(loaded).__name__}.")
    for index, entry in enumerate(loaded):
        yield f"{file}[{index}]", entry


def _turns(where: str, raw: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(raw, list) or not raw:
        raise InputError(f"{where}: conversations: expected a non-empty list of {{from, value}}.")
    turns = []
    for number, turn in enumerate(raw):
        wanted = ("human", "gpt")[number % 2]
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise InputError(f"{where}: conversations[{number}]: expected {{from, value}} with a text value.")
        if turn.get("from") != wanted:
            raise InputError(f"{where}: conversations[{number}].from: {turn.get('from')!r}, expected {wanted!r}. "
                             "Turns alternate, human first.")
        turns.append((wanted, turn["value"]))
    if turns[-1][0] != "gpt":
        raise InputError(f"{where}: conversations: the last turn must be an answer (from: gpt).")
    return tuple(turns)


def _sample(where: str, entry: object, image_root: Path, default_task: str) -> Sample:
    if not isinstance(entry, dict):
        raise InputError(f"{where}: expected an object with id, image and conversations.")
    turns = _turns(where, entry.get("conversations"))
    name = entry.get("image")
    marks = [i for i, (_, value) in enumerate(turns) if "<image>" in value]
    if name is not None:
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{where}: image: {name!r} must be a path inside data.image_root ({image_root}).")
        if marks != [0] or turns[0][1].count("<image>") != 1:
            raise InputError(f"{where}: conversations: <image> must stand once, in the first human turn.")
        image = image_root / name
        if not image.is_file():
            raise InputError(f"{where}: image: {image} does not exist. Mend the entry or set data.image_root.")
    elif marks:
        raise InputError(f"{where}: the conversation has <image> but the entry has no image.")
    else:
        image = None
    split = entry.get("split", "train")
    if split not in SPLITS:
        raise InputError(f"{where}: split: {split!r}, expected one of {', '.join(SPLITS)}.")
    task = entry.get("task", default_task)
    client = entry.get("client", "")
    for key, value in (("task", task), ("client", client)):
        if not isinstance(value, str | int):
            raise InputError(f"{where}: {key}: {value!r} must be a text.")
    return Sample(str(entry.get("id", where)), image, turns, str(task), str(client), split, where)


def read_samples(path: str | Path, image_root: str | Path | None = None) -> list[Sample]:
    """All samples of a JSON/JSONL file, or of every such file in a directory (task = file name where not given).

    Args:
        image_root: folder that `image` is relative to; default: `images` beside the file if there is one, else its
            folder.

    Raises:
        InputError: naming file, entry and key.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in (".json", ".jsonl"))
        folder = path
    else:
        files, folder = [path], path.parent
    if not files or not all(f.is_file() for f in files):
        raise InputError(f"data.path: {path} is neither a JSON/JSONL file nor a folder that holds one.")
    if image_root is not None:
        root = Path(image_root).expanduser()
        if not root.is_dir():
            raise InputError(f"data.image_root: {root} is not a folder.")
    else:
        root = folder / "images" if (folder / "images").is_dir() else folder
    samples = [_sample(where, entry, root, file.stem) for file in files for where, entry in _entries(file)]
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
        if isinstance(sample.image, Image.Image):
            sample.image.save(partial / "images" / f"{sample.id}.png")
            entry["image"] = f"{sample.id}.png"
        entries.append(entry)
    (partial / "data.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    partial.rename(out)
    return len(entries)
