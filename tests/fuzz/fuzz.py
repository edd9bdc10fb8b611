"""Fuzzes the readers of all input files: `python tests/fuzz/fuzz.py TARGET SECONDS`, or `all` for every target.

The targets are config (YAML), llava (JSON), jsonl, image, safetensors, shapes (a checkpoint's config.json) and
manifest (a snapshot's). Any exception but an InputError is a finding, and so is an input that takes over 20 s or 4 GB;
it is saved beside this file as `crash-…`. The first inputs are in corpus/<target>. The program needs `pip install
atheris`, which runs on Linux and is not among the test extras.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
TARGETS = ("config", "llava", "jsonl", "image", "safetensors", "shapes", "manifest")


def target(name: str, folder: Path):
    """Returns a function that reads an input, given as bytes, as target `name` does."""
    import atheris

    with atheris.instrument_imports(include=["pilot_jax.config", "pilot_jax.data", "pilot_jax.models.checkpoints",
                                             "pilot_jax.runs.resume", "yaml", "json"]):
        from pilot_jax.config import load_config
        from pilot_jax.data.images import read_image
        from pilot_jax.data.llava.reading import read_samples
        from pilot_jax.data.llava.sample import Entry, parse_sample
        from pilot_jax.errors import InputError
        from pilot_jax.federation.roles import Roles
        from pilot_jax.federation.state import ClientState, State
        from pilot_jax.files import signed
        from pilot_jax.models.checkpoints import reading, tensor_names
        from pilot_jax.models.checkpoints.hf_config import read_vlm_config
        from pilot_jax.models.pretrained import EMBEDDED, model_directory
        from pilot_jax.runs import resume, snapshot_files

    logging.disable()
    names = {"config": "c.yaml", "llava": "d.json", "jsonl": "d.jsonl", "image": "x.png",
             "safetensors": "model.safetensors", "shapes": "config.json", "manifest": "manifest.json"}
    file = folder / names[name]
    if name == "manifest":
        file = folder / "000001" / "manifest.json"
        file.parent.mkdir()
    shapes = read_vlm_config(model_directory(EMBEDDED))
    turns = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    entry = Entry("d.json[0]", {"image": "x.png", "conversations": turns}, "t", "c", "train")
    nothing = State((ClientState({}), ClientState({})), {})

    def resigned(data: bytes) -> bytes:
        """Returns the manifest with a matching checksum, which an attacker could also write."""
        try:
            manifest = json.loads(data)
        except (ValueError, RecursionError):
            return data
        if isinstance(manifest, dict):
            return signed({"format": snapshot_files.FORMAT} | manifest).encode()
        return json.dumps(manifest).encode()

    def read() -> None:
        if name == "config":
            load_config(file)
        elif name in ("llava", "jsonl"):
            read_samples(file)
        elif name == "image":
            read_image(parse_sample(entry, folder))
        elif name == "safetensors":
            tensors = reading.open_tensors(file)
            for key in tensors.shapes():
                tensors.read(key)
            reading._check_names([reading.Source(file, tensor_names.canonical_name)], shapes)
        elif name == "shapes":
            tensor_names.pieces(read_vlm_config(folder))
        else:
            resume.Snapshots(folder, ["a", "b"], Roles(()), 2).load(nothing, None, lambda text: None, writing=False)

    def one(data: bytes) -> None:
        file.write_bytes(resigned(data) if name == "manifest" else data)
        with contextlib.suppress(InputError):
            read()

    return one


def main() -> int:
    name, seconds = sys.argv[1], int(sys.argv[2])
    if name == "all":
        return max(subprocess.run([sys.executable, __file__, t, str(seconds)]).returncode for t in TARGETS)
    import atheris

    os.environ["JAX_PLATFORMS"] = "cpu"
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
    grown = folder / "corpus"
    grown.mkdir()
    found = folder / "in"
    found.mkdir()
    atheris.Setup([__file__, str(grown), str(HERE / "corpus" / name), f"-max_total_time={seconds}", "-timeout=20",
                   "-rss_limit_mb=4096", "-max_len=20000", f"-artifact_prefix={HERE}/", "-print_final_stats=1",
                   "-verbosity=0"], target(name, found))
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
