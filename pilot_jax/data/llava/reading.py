"""Reads and writes LLaVA-format data: JSON, JSONL, Parquet, or a Hugging Face `datasets` folder.

Reading Parquet and `datasets` folders needs the extra `data`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from PIL import Image

from pilot_jax.config import LimitsConfig
from pilot_jax.data.llava.image_field import LIMITS
from pilot_jax.data.llava.sample import Entry, Sample, parse_sample
from pilot_jax.data.llava.tables import table_values
from pilot_jax.errors import InputError
from pilot_jax.files import new_folder

SUFFIXES = (".json", ".jsonl", ".parquet")


def _lines(file: Path, limits: LimitsConfig) -> Iterator[tuple[str, object]]:
    """Yields (place for messages, object) of each line of a JSONL file, which is never in memory as a whole."""
    number, most = 0, 100 * limits.text_characters
    with file.open(encoding="utf-8-sig", newline="\n") as lines:
        while line := lines.readline(most):
            number += 1
            if len(line) == most:
                raise InputError(f"{file}:{number}: the line has {most} or more characters. If that is right, raise "
                                 "data.limits.text_characters.")
            if line.strip():
                try:
                    yield f"{file}:{number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{file}:{number}: not valid JSON ({error}). Write one object per line.") from None


def _json_values(file: Path, limits: LimitsConfig) -> Iterator[tuple[str, object]]:
    """Yields (place for messages, object) of each sample of a JSON or JSONL file."""
    try:
        if file.suffix == ".jsonl":
            yield from _lines(file, limits)
            return
        if file.stat().st_size > limits.file_bytes:
            raise InputError(f"{file}: {file.stat().st_size} bytes, data.limits.file_bytes is {limits.file_bytes}. "
                             "Raise the limit, or convert the file to JSONL, which is read line by line.")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error}). data.path needs UTF-8 JSON or JSONL.") from None
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not valid JSON ({error}). Correct the file.") from None
    if not isinstance(loaded, list):
        raise InputError(f"{file}: a LLaVA file is a JSON list of samples, this is a {type(loaded).__name__}.")
    for index, entry in enumerate(loaded):
        yield f"{file}[{index}]", entry


def _is_dataset(folder: Path) -> bool:
    """Returns whether the folder was saved by Hugging Face's `datasets`."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def _files(path: Path) -> list[tuple[Path, str]]:
    """Returns (file, task) of every data file of `path`, in order; the task is that of a folder per task, else ""."""
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
    """Returns (task, client, split) as a file's name says them, with "" for a task or client that it does not say.

    Such names are `vqa.json`, `vqa_test.json`, `vqa/clinic.json` and `test.json`; the split is "train" by default.

    Args:
        names: the value of `data.file_names`.
    """
    match = re.fullmatch(r"(?:(.+)[._-])?(train|validation|val|test)", file.stem)
    stem = (match[1] or "") if match else file.stem
    split = {"val": "validation"}.get(match[2], match[2]) if match else "train"
    if folder_task:
        return folder_task, stem, split
    return (file.parent.name, stem, split) if names == "client" else (stem or file.parent.name, "", split)


def read_entries(path: str | Path, file_names: str = "task", limits: LimitsConfig = LIMITS) -> Iterator[Entry]:
    """Yields the raw samples of a file, or of all data files in a folder and in its folders per task.

    Raises:
        InputError: there is no data file, or a file cannot be parsed.
    """
    path = Path(path).expanduser()
    files = _files(path)
    if not files:
        raise InputError(f"data.path: {path} is neither a data file ({', '.join(SUFFIXES)}) nor a folder that holds "
                         "one.")
    for file, folder_task in files:
        task, client, split = _defaults(file, folder_task, file_names)
        if file.is_dir() or file.suffix == ".parquet":
            for where, value, own_split in table_values(file):
                yield Entry(where, value, task, client, own_split or split)
        else:
            for where, value in _json_values(file, limits):
                yield Entry(where, value, task, client, split)


def find_image_root(path: str | Path, image_root: str | Path | None) -> Path:
    """Returns the folder from which image paths start.

    It is `image_root` or, if that is None, the folder `images` beside the data if it exists, else the data's folder.

    Raises:
        InputError: `image_root` is not a folder.
    """
    path = Path(path).expanduser()
    folder = path if path.is_dir() else path.parent
    if image_root is None:
        return folder / "images" if (folder / "images").is_dir() else folder
    root = Path(image_root).expanduser()
    if not root.is_dir():
        raise InputError(f"data.image_root: {root} is not a folder. Give the folder that holds the images.")
    return root


def read_samples(path: str | Path, image_root: str | Path | None = None, file_names: str = "task",
                 limits: LimitsConfig = LIMITS) -> list[Sample]:
    """Returns all samples of a data file or folder (see `read_entries`); images are found by `find_image_root`.

    Raises:
        InputError: a sample is wrong (the message names file, entry and key), or there is no sample.
    """
    root = find_image_root(path, image_root)
    samples = [parse_sample(entry, root, limits) for entry in read_entries(path, file_names, limits)]
    if not samples:
        raise InputError(f"{path}: holds no sample.")
    return samples


def write_samples(samples: Iterable[Sample], out: Path) -> int:
    """Writes `data.json` and `images/*.png` into the new folder `out` and returns the number of samples.

    The folder appears under its name only when it is complete.

    Raises:
        InputError: `out` exists.
    """
    if out.exists():
        raise InputError(f"{out}: exists already. Choose a new folder; nothing was written.")
    entries = []
    with new_folder(out) as folder:
        (folder / "images").mkdir()
        for sample in samples:
            entry = {"id": sample.id, "task": sample.task, "client": sample.client, "split": sample.split,
                     "conversations": [{"from": who, "value": text} for who, text in sample.turns]}
            if sample.answers:
                entry["answers"] = list(sample.answers)
            if isinstance(sample.image, Image.Image):
                sample.image.save(folder / "images" / f"{sample.id}.png")
                entry["image"] = f"{sample.id}.png"
            entries.append(entry)
        (folder / "data.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    return len(entries)
