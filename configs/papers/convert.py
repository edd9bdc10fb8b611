"""Turns public downloads into the layout that this package reads: one JSON file per task and split, or per client.

    python configs/papers/convert.py gqa ROOT OUT
    python configs/papers/convert.py ocr_vqa ROOT OUT
    python configs/papers/convert.py coco ROOT OUT
    python configs/papers/convert.py fcit ROOT OUT --task DVQA
    python configs/papers/convert.py fed_nature ROOT OUT
    python configs/papers/convert.py projector OUT --sizes 768 3072

ROOT is the folder of the downloads, from which the paths of images start (`data.image_root: ROOT`). What must be in it
is said at each function. `--train` and `--test` are the most samples of each split that are written, drawn with
`--seed`; without them all are. No file is downloaded, and no image is opened: `pilot-jax data check` does that.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

SHORT = "Answer with one word or a few words."
CAPTION = "Describe the picture in one sentence."


def entry(name: str, image: str | None, question: str, answers: list[str], **more: str) -> dict:
    """Returns a LLaVA entry; the first answer is trained, and all are references to score against."""
    prompt = question if image is None else f"<image>\n{question}"
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answers[0]}]
    out = {"id": name, "conversations": turns, **more}
    if image is not None:
        out["image"] = image
    if len(answers) > 1:
        out["answers"] = answers
    return out


def read(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        sys.exit(f"{file}: cannot be read ({error.strerror}). See the head of {__file__} for what must be in ROOT.")


def gqa(root: Path) -> Iterator[tuple[str, str, dict]]:
    """gqa/train_balanced_questions.json, gqa/testdev_balanced_questions.json and gqa/images/, as GQA's archives have
    them."""
    for split, file in (("train", "train_balanced_questions.json"), ("test", "testdev_balanced_questions.json")):
        for name, q in read(root / "gqa" / file).items():
            image = f"gqa/images/{q['imageId']}.jpg"
            yield "gqa", split, entry(f"{split}-{name}", image, f"{q['question']}\n{SHORT}", [q["answer"]])


def ocr_vqa(root: Path) -> Iterator[tuple[str, str, dict]]:
    """ocr_vqa/dataset.json, and ocr_vqa/images/ with a file per book, named by its key and the end of its address."""
    splits = {1: "train", 2: "validation", 3: "test"}
    for book, record in read(root / "ocr_vqa" / "dataset.json").items():
        image = f"ocr_vqa/images/{book}{Path(record['imageURL']).suffix}"
        for number, (question, answer) in enumerate(zip(record["questions"], record["answers"], strict=True)):
            yield "ocr_vqa", splits[record["split"]], entry(f"{book}-{number}", image, f"{question}\n{SHORT}", [answer])


def coco(root: Path) -> Iterator[tuple[str, str, dict]]:
    """coco/annotations/captions_{train,val}2017.json, coco/train2017/ and coco/val2017/. One sample per image, with all
    captions as references; captions of val2017 are the test split."""
    for folder, split in (("train2017", "train"), ("val2017", "test")):
        found = read(root / "coco" / "annotations" / f"captions_{folder}.json")
        captions: dict[int, list[str]] = {}
        for one in found["annotations"]:
            captions.setdefault(one["image_id"], []).append(" ".join(one["caption"].split()))
        for image in found["images"]:
            if image["id"] in captions:
                yield "caption", split, entry(f"{folder}-{image['id']}", f"coco/{folder}/{image['file_name']}", CAPTION,
                                              captions[image["id"]])


def fcit(root: Path, task: str) -> Iterator[tuple[str, str, dict]]:
    """instructions/TASK/train.json and test.json of FCIT's data, and its images in datasets/. Entries are LLaVA's
    already, or have `text` and `answer`; the paths of images start from datasets/."""
    for split in ("train", "test"):
        for number, record in enumerate(read(root / "instructions" / task / f"{split}.json")):
            image = f"datasets/{record['image']}" if record.get("image") else None
            name = f"{split}-{record.get('id', record.get('question_id', number))}-{number}"
            if "conversations" in record:
                made = {"id": name, "conversations": record["conversations"]} | ({"image": image} if image else {})
            else:
                answer = record["answer"] if isinstance(record["answer"], list) else [str(record["answer"])]
                made = entry(name, image, record["text"].replace("<image>", "").strip(), answer)
            yield task.lower(), split, made


def fed_nature(root: Path) -> Iterator[tuple[str, str, dict]]:
    """clients/train/*.json and clients/test/*.json of Fed-Nature, one file per client in LLaVA's layout, and images/. A
    client has one task, and the files do not name it: each client is a task of its own here."""
    for split in ("train", "test"):
        files = sorted((root / "clients" / split).glob("*.json"))
        if not files:
            sys.exit(f"{root / 'clients' / split}: has no JSON files.")
        for file in files:
            for number, record in enumerate(read(file)):
                made = {"id": f"{file.stem}-{split}-{number}", "conversations": record["conversations"],
                        "client": file.stem}
                if record.get("image"):
                    made["image"] = f"images/{record['image']}"
                yield file.stem, split, made


def write(samples: Iterator[tuple[str, str, dict]], out: Path, most: dict[str, int | None], seed: int) -> None:
    """Writes OUT/TASK.json and OUT/TASK_SPLIT.json, and says how many samples each has."""
    files: dict[str, list[dict]] = {}
    for task, split, sample in samples:
        files.setdefault(task if split == "train" else f"{task}_{split}", []).append(
            sample | {"task": task, "split": split})
    out.mkdir(parents=True, exist_ok=True)
    for name, found in files.items():
        limit = most.get(found[0]["split"])
        if limit is not None and limit < len(found):
            found = random.Random(seed).sample(found, limit)
        (out / f"{name}.json").write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
        print(f"{out / name}.json: {len(found):,} of {len(files[name]):,}")


def projector(out: Path, vision: int, language: int, seed: int) -> None:
    """Writes a projector of two layers that has not been trained, drawn as torch draws linear layers."""
    import numpy as np
    from safetensors.numpy import save_file

    rng, tensors = np.random.default_rng(seed), {}
    for number, size in ((0, vision), (2, language)):
        for kind, shape in (("weight", (language, size)), ("bias", (language,))):
            tensors[f"model.mm_projector.{number}.{kind}"] = rng.uniform(-1, 1, shape).astype(np.float32) / size**0.5
    save_file(tensors, out)
    print(f"{out}: a projector of {vision} to {language} features that has not been trained")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["gqa", "ocr_vqa", "coco", "fcit", "fed_nature", "projector"])
    parser.add_argument("paths", nargs="+", type=Path, help="ROOT OUT; for projector: OUT")
    parser.add_argument("--task", default="", help="fcit: the folder of one task in instructions/")
    parser.add_argument("--train", type=int)
    parser.add_argument("--test", type=int)
    parser.add_argument("--sizes", nargs=2, type=int, default=[768, 3072], help="projector: widths of tower and model")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if len(args.paths) != (1 if args.what == "projector" else 2) or (args.what == "fcit") != bool(args.task):
        parser.error("give ROOT and OUT (projector: OUT alone), and --task with fcit alone")
    if args.what == "projector":
        projector(args.paths[0], *args.sizes, args.seed)
        return
    root, out = args.paths
    samples = fcit(root, args.task) if args.what == "fcit" else globals()[args.what](root)
    write(samples, out, {"train": args.train, "test": args.test, "validation": args.test}, args.seed)


if __name__ == "__main__":
    main()
