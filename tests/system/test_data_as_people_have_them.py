"""Tests a folder of data as people have them, from `data check` over runs to the report: nothing surprises."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import write_checkpoint
from PIL import Image

SIZES = [1, 2, 3, 500, 60, *([4] * 25)]  # samples of each of the 30 clients
TASKS = ("röntgen", "museum")
QUESTION = [{"from": "human", "value": "<image>\nwhat colour?"}, {"from": "gpt", "value": "red"}]


def save_pictures(folder):
    """Writes a red picture in every kind of file that Pillow does not read as three bytes per pixel, and others."""
    red = Image.new("RGB", (24, 12), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = Image.new("RGBA", (24, 12), (255, 0, 0, 0))
    clear.paste((255, 0, 0, 255), (0, 0, 12, 12))
    ramp = np.linspace(0, 65535, 24 * 12).astype(np.uint16).reshape(12, 24)
    for name, image, options in (
            ("cmyk.jpg", red.convert("CMYK"), {}), ("sechzehn.png", Image.fromarray(ramp), {}),
            ("bewegt.gif", red, {"save_all": True, "append_images": [Image.new("RGB", (24, 12), "blue")]}),
            ("netz.webp", clear, {"lossless": True}), ("gedreht.jpg", red, {"exif": exif}),
            ("durchsichtig.png", clear, {}), ("palette.png", red.convert("P"), {"transparency": 0}),
            ("猫 und Straße.png", red, {})):
        image.save(folder / name, **options)


def write_data(folder):
    """Writes a file for each client, with a byte order mark or line ends of Windows, in a folder for each task."""
    (folder / "images").mkdir(parents=True)
    save_pictures(folder / "images")
    pictures = sorted(path.name for path in (folder / "images").iterdir())
    for number, size in enumerate(SIZES):
        entries = []
        for i in range(size):
            text = [{"from": "human", "value": f"what is {number} and {i}?"},
                    {"from": "gpt", "value": "" if i == 7 else "x"}]
            entry = {"id": i, "conversations": text if i % 3 else QUESTION}
            entries.append(entry if i % 3 else entry | {"image": pictures[(number + i // 3) % len(pictures)]})
            if i % 2:
                entries[-1]["task"] = TASKS[number % 2]
        name = f"ünit {number}" if number % 5 else f"клиника-{number}"
        task = folder / TASKS[number % 2]
        task.mkdir(exist_ok=True)
        if number % 3:
            lines = "\r\n".join(json.dumps(e, ensure_ascii=False) for e in entries)
            (task / f"{name}.jsonl").write_bytes(lines.encode())
        else:
            (task / f"{name}.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(entries, indent=1).encode())


@pytest.mark.long
def test_from_check_to_report(call, tmp_path):
    write_checkpoint(tmp_path / "llava", text={"max_position_embeddings": 512})
    write_data(tmp_path / "data")
    (tmp_path / "c.yaml").write_text(json.dumps({
        "model": {"path": str(tmp_path / "llava"), "lora": {"rank": 2}},
        "data": {"path": str(tmp_path / "data"), "template": "vicuna_short"},
        "federation": {"rounds": 1, "local_steps": 1, "schedule": "single"}, "strategy": {"name": "fedavg"},
        "train": {"batch_size": 2}, "eval": {"max_new_tokens": 1, "every": 1},
        "system": {"unroll": 1, "length_spread": 4.0, "client_chunk": 10}}))
    held = ["--set", "data.hold_out={validation: 0.1, test: 0.1}"]
    check = ["data", "check", tmp_path / "data", "--config", tmp_path / "c.yaml", "--model", tmp_path / "llava"]

    code, out, err = call(*check)
    assert code == 0 and f"{sum(SIZES)} samples, all readable" in out, err
    assert "no client has test samples, so the run ends without scores" in out and "data.hold_out.test" in out
    assert "2 samples have an empty answer" in out and "museum/ünit 3" in out  # of the clients with more than 7 samples
    assert "samples name no task and get that of their file's name: museum, röntgen" in out
    assert "have the id of another one" in out
    code, out, err = call("run", tmp_path / "c.yaml", "--out", tmp_path / "plain")
    assert code == 0, err
    assert "warning: no client has test samples" in out and "eval.every: 1 scores nothing" in out
    assert "No scores: the data have no test samples" in out and "–" not in out
    code, out, err = call("report", tmp_path / "plain", "--out", tmp_path / "plain.html")
    assert code == 0, err
    page = (tmp_path / "plain.html").read_text()
    assert "The data have no test samples, so there are no scores and no answers" in page
    code, _, err = call("evaluate", tmp_path / "plain")
    assert code == 2 and "no client has test samples" in err and "data.hold_out.test" in err
    code, _, err = call("compare", tmp_path / "c.yaml", "--strategies", "fedavg", "--out", tmp_path / "all")
    assert code == 2 and "no client has test samples" in err and "data.hold_out.test" in err

    code, out, err = call(*check, *held)
    assert code == 0 and "1 of 30 clients has no test samples" in out and "no client has" not in out, err
    code, out, err = call("run", tmp_path / "c.yaml", *held, "--out", tmp_path / "run")
    out = " ".join(out.split())  # lines are broken at 80 characters
    assert code == 0 and "1 of 30 clients has no test samples and gets no test score (first: клиника-0)" in out, err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["task_by_client"].keys() - summary["score_by_client"].keys() == {"клиника-0"}
    assert len(summary["task_by_client"]) == 30 and summary["tasks"] == sorted(TASKS)
    code, out, err = call("report", tmp_path / "run", "--answers", 1, "--out", tmp_path / "run.html")
    assert code == 0, err
    assert "röntgen" in (tmp_path / "run.html").read_text()
