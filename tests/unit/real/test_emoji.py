"""Tests of the emoji set: its pools, pictures and checksum, its tasks, its build from tarballs, and `data emoji`."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from pilot_jax.config import EmojiConfig, parse_config
from pilot_jax.errors import InputError
from pilot_jax.real import emoji, emoji_build, emoji_colours, emoji_kinds, emoji_tasks
from pilot_jax.real.tarballs import Tarball
from pilot_jax.runs.generated import GENERATED

ALL_TASKS = EmojiConfig(tasks=tuple(emoji_tasks.TASKS), train=24)


@pytest.fixture(scope="module")
def samples():
    return list(emoji_tasks.emoji_samples(ALL_TASKS))


def pixels(sample):
    return np.asarray(sample.image).tobytes()


# -- the set -----------------------------------------------------------------------------------------------------------


def test_the_set_is_the_one_that_is_documented():
    """The checksum covers every word and every pixel; whoever builds a new set changes it here, and trains again."""
    assert emoji.checksum() == "a5f53f4e360119f0f87c56d371ba84f065b7296afd7afb0cce41a783c4255f04"


def test_pools_share_no_group_and_have_their_shares():
    every = emoji.concepts()
    assert len(every) == len({c.key for c in every}) == 882
    groups = {name: {c.group for c in emoji.pool(name)} for name in emoji.POOLS}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values()))
    for name, share in emoji.POOLS.items():
        assert abs(len(emoji.pool(name)) / len(every) - share) < 0.01
    kinds = {name: {c.kinds[0] for c in emoji.pool(name) if c.kinds} for name in emoji.POOLS}
    assert kinds["base"] == kinds["train"] == kinds["test"] and len(kinds["test"]) == 36


def test_pools_share_no_picture():
    """No picture, in any style, is in two pools, even as a thumbnail of 8 × 8 pixels of 16 levels."""
    seen = {}
    for name in emoji.POOLS:
        for one in emoji.pictures(name):
            thumbnail = np.asarray(one.image.resize((8, 8), Image.Resampling.BOX)) // 16
            assert seen.setdefault(thumbnail.tobytes(), name) == name, one.concept.name


def test_stored_pools_are_those_of_the_rule():
    raw = [dataclasses.asdict(c) for c in emoji.concepts()]
    emoji_build.assign_pools(raw)
    assert [one["pool"] for one in raw] == [c.pool for c in emoji.concepts()]


def test_pictures_are_small_squares_on_white_with_words():
    for one in emoji.pictures("base"):
        array = np.asarray(one.image)
        assert one.image.mode == "RGB" and array.shape == (56, 56, 3)
        assert (array[:2] == 255).all() and (array[:, -2:] == 255).all() and array.min() < 230
        assert set(one.colours) <= set(emoji_colours.COLOURS) and len(one.colours) <= 2
    assert all(set(c.translations) == set(emoji.LANGUAGES) for c in emoji.concepts())


def test_the_tables_name_emoji_once_and_only_such_as_are_in_the_set():
    words = {word for c in emoji.concepts() for word in (c.name, *c.names)}
    for table in (emoji_kinds.MOVED, emoji_kinds.GROUPS):
        assert {e.replace("’", "'") for e in emoji_kinds.inverse(table)} <= words
    kinds = {c.kinds[0] for c in emoji.concepts() if c.kinds}
    assert {kind for family in emoji_tasks.FAMILIES for kind in family} == kinds
    with pytest.raises(ValueError, match="'b'"):
        emoji_kinds.inverse("x: a, b\ny: b,\n  c")


@pytest.mark.parametrize(("rgb", "expected"), [
    ((220, 30, 30), ("red",)), ((255, 205, 60), ("yellow",)), ((244, 144, 12), ("orange",)),
    ((60, 160, 60), ("green",)), ((60, 130, 230), ("blue",)), ((130, 60, 200), ("purple",)),
    ((250, 120, 180), ("pink",)), ((120, 75, 50), ("brown",)),
    ((20, 20, 22), ("black",)), ((130, 130, 132), ("grey",)), ((250, 250, 250), ("white",)),
    ((255, 172, 51), ("orange", "yellow"))])
def test_plain_colours_have_their_names(rgb, expected):
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[2:6, 2:6] = (*rgb, 255)  # the rest is transparent and does not count
    assert emoji_colours.main_colours(rgba) == expected
    rgba[2:4, 2:6] = (60, 160, 60, 255) if expected != ("green",) else (220, 30, 30, 255)
    assert emoji_colours.main_colours(rgba) == ()  # half of it is green
    assert emoji_colours.main_colours(np.zeros((8, 8, 4), np.uint8)) == ()


def test_shades_of_one_colour_are_both_right():
    rgba = np.full((8, 8, 4), 255, np.uint8)
    rgba[:4, :, :3], rgba[4:, :, :3] = (250, 205, 60), (240, 130, 20)
    assert set(emoji_colours.main_colours(rgba)) == {"yellow", "orange"}
    rgba[:7, :, :3] = (250, 205, 60)
    assert emoji_colours.main_colours(rgba) == ("yellow",)


# -- tasks -------------------------------------------------------------------------------------------------------------


def test_clients_are_tasks_in_styles_with_their_numbers_of_samples(samples):
    counts = Counter((s.client, s.task, s.split) for s in samples)
    assert len(counts) == 5 * 3 * 3 and len({s.id for s in samples}) == len(samples)
    for (client, task, split), count in counts.items():
        assert client.startswith(f"{task}_") and count == {"train": 24, "validation": 16, "test": 48}[split]
    default = Counter(s.client for s in emoji_tasks.emoji_samples(EmojiConfig()))
    assert len(default) == 12 and set(default.values()) == {48 + 16 + 48} and "name_noto" not in default


def test_samples_show_pictures_of_their_pool_and_none_twice(samples):
    pool_of = {one.image.tobytes(): name for name in emoji.POOLS for one in emoji.pictures(name)}
    for client in {s.client for s in samples}:
        own = [s for s in samples if s.client == client]
        assert all(pool_of[pixels(s)] == s.split for s in own) and len({pixels(s) for s in own}) == len(own)
    many = emoji_tasks.client_samples("kind", "noto", "validation", 150, 0)  # more than the pool has: each comes again
    assert set(Counter(map(pixels, many)).values()) <= {2, 3}


def test_samples_depend_on_the_seed_and_on_no_other_client(samples):
    alone = EmojiConfig(tasks=("yesno",), styles=("fluent",), train=24)
    facts = [(s.id, s.turns, s.answers, pixels(s)) for s in emoji_tasks.emoji_samples(alone)]
    assert facts == [(s.id, s.turns, s.answers, pixels(s)) for s in samples if s.client == "yesno_fluent"]
    other = emoji_tasks.emoji_samples(alone.model_copy(update={"seed": 1}))
    assert [f[1:] for f in facts] != [(s.turns, s.answers, pixels(s)) for s in other]


def test_yes_and_no_are_equally_many_and_true(samples):
    concept_of = {one.image.tobytes(): one for name in emoji.POOLS for one in emoji.pictures(name)}
    for split in ("train", "validation", "test"):
        own = [s for s in samples if s.task == "yesno" and s.split == split]
        about_kinds = [s for s in own if s.turns[0][1].startswith("<image>\nIs this ")]
        for part in (about_kinds, [s for s in own if s not in about_kinds]):
            assert Counter(s.turns[1][1] for s in part) == {"yes": len(part) // 2, "no": len(part) // 2}
        by_question = Counter((s.client, s.turns[0][1], s.turns[1][1]) for s in own)
        alone = [s for s in own if by_question[s.client, s.turns[0][1], "yes"] != by_question[
            s.client, s.turns[0][1], "no"]]  # its question is more often yes, or no
        assert len(alone) <= len(own) // 10
        for s in own:
            one = concept_of[pixels(s)]
            names = [*map(emoji_tasks.noun_phrase, one.concept.kinds), *one.colours]
            assert any(s.turns[0][1].endswith(f" {name}?") for name in names) == (s.turns[1][1] == "yes"), s.turns


@pytest.mark.parametrize("count", [1, 2, 3, 5, 300])
def test_any_number_of_yes_no_questions_is_balanced(count):
    answers = Counter(s.turns[1][1] for s in emoji_tasks.client_samples("yesno", "noto", "validation", count, 7))
    assert answers.total() == count and 0 <= answers["yes"] - answers["no"] <= 2


def test_several_answers_are_right_where_honest(samples):
    texts = {(s.turns[0][1].removeprefix("<image>\n"), s.references) for s in samples}
    assert any(q == "Which colour is most of it?" and len(right) == 2 for q, right in texts)
    assert all(s.references[0] == s.turns[1][1] for s in samples)
    for question, right in texts:
        if question.startswith("Describe"):
            assert all(text.split()[0] in ("a", "an", *emoji_colours.COLOURS) for text in right)
    assert emoji_tasks.noun_phrase("fruit", "orange") == "an orange fruit"
    assert emoji_tasks.noun_phrase("food") == "food"


def test_answers_that_ignore_the_picture_score_little(samples):
    scores = emoji_tasks.chance_scores(samples)
    assert scores["yesno"][0] == 0.5 and abs(scores["yesno"][1] - 0.5) < 0.12
    assert max(scores["kind"]) < 0.2 and max(scores["colour"]) < 0.3 and max(scores["describe"]) < 0.1
    assert "| all 882 |" in emoji_tasks.summary(seeds=1)


# -- config and command ------------------------------------------------------------------------------------------------


def test_the_config_names_the_set():
    data = parse_config({"data": {"path": "emoji", "emoji": {"tasks": ["kind"], "train": 3}}}, "c.yaml").data
    assert len(list(GENERATED["emoji"].samples(data, None))) == 3 * (3 + 16 + 48)
    assert GENERATED["emoji"].num_tasks(data) == 1
    for wrong in ({"tasks": ["kind", "kind"]}, {"tasks": []}, {"styles": ["apple"]}, {"train": 0}):
        with pytest.raises(InputError, match=rf"data\.emoji\.{next(iter(wrong))}"):
            parse_config({"data": {"emoji": wrong}}, "c.yaml")


def test_the_command_writes_data_that_are_readable(call, tmp_path):
    code, out, error = call("data", "emoji", tmp_path / "e", "--train", 4, "--validation", 2, "--test", 2)
    assert code == 0 and "96 samples" in out, error
    code, out, error = call("data", "check", tmp_path / "e")
    assert code == 0 and "96 samples, all readable" in out and "yesno_twemoji" in out, error
    code, _, error = call("data", "emoji", tmp_path / "x", "--styles", "noto,apple")
    assert code == 2 and "data.emoji.styles" in error and not (tmp_path / "x").exists()


# -- the build ---------------------------------------------------------------------------------------------------------


def write_tarball(folder, package, members):
    """Writes a tarball of text or bytes, or of links (None), and returns it with its checksum."""
    file = folder / Tarball(package, "1", "").file
    with tarfile.open(file, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                archive.addfile(info)
                continue
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return Tarball(package, "1", hashlib.sha256(file.read_bytes()).hexdigest())


def tiny(folder, **change):
    """Writes tiny tarballs with a dog, a red apple and a flag, changed by a dict of members for each package."""
    entries = [("1F436", "dog face", 0), ("1F34E", "red apple", 1), ("1F3C1", "chequered flag", 2)]
    data = [{"hexcode": code, "label": label, "subgroup": subgroup, "tags": ["pet", "5–0"]}
            for code, label, subgroup in entries]
    words = {f"package/{code}/data.json": data for code in ("en", *emoji.LANGUAGES)}
    words |= {f"package/en/shortcodes/{name}.json": {"1F34E": ["apple", "red_apple", "x2"]}
              for name in emoji_build.SHORTCODES}
    words["package/meta/groups.json"] = {"subgroups": {"0": "animal-mammal", "1": "food-fruit", "2": "flag"}}
    out = io.BytesIO()
    Image.new("RGBA", (16, 16), (220, 30, 30, 255)).save(out, "PNG")
    sources = {}
    for style, prefix in (("noto", "package/a/"), ("twemoji", "package/b/"), ("fluent", "package/c/")):
        pictures = {f"{prefix}{code.lower()}.png": out.getvalue() for code, _, _ in entries}
        sources[style] = write_tarball(folder, f"@x/{style}", {**pictures, **change.get(style, {})}), prefix
    words = {name: value for name, value in {**words, **change.get("words", {})}.items() if value != "missing"}
    return {"words": write_tarball(folder, "words", words), "sources": sources}


def test_the_build_makes_a_set_of_tiny_tarballs(tmp_path):
    count = emoji_build.build(tmp_path, tmp_path / "set", side=28, **tiny(tmp_path))
    dog, apple = emoji.concepts(tmp_path / "set")
    assert count == 2 and (dog.name, dog.names, dog.kinds) == ("dog", ("dog face",), ("mammal",))
    assert dog.keywords == ("pet",)
    assert (apple.name, apple.names, apple.kinds) == ("red apple", ("apple",), ("fruit",))
    assert apple.colours["noto"] == ("red",) and set(apple.translations) == set(emoji.LANGUAGES)
    assert emoji.picture(dog, "fluent", tmp_path / "set").image.size == (28, 28)
    assert "Apache" in (tmp_path / "set" / "NOTICE").read_text()
    emoji_build.build(tmp_path, tmp_path / "again", side=28, **tiny(tmp_path))
    for file in (tmp_path / "set").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


BAD = {
    "a member that leads out": ({"noto": {"package/../../x.png": b""}}, "x-noto-1.tgz: the member .* leads out"),
    "an absolute member": ({"noto": {"/x.png": b""}}, "x-noto-1.tgz: the member .* leads out"),
    "a link": ({"fluent": {"package/c/1f436.png": None}}, "x-fluent-1.tgz: the member .* no plain file"),
    "no picture": ({"twemoji": {"package/b/1f436.png": b"x"}}, "x-twemoji-1.tgz: 1f436: not a picture"),
    "a missing member": ({"words": {"package/meta/groups.json": "missing"}}, "has no package/meta/groups.json"),
    "bad JSON": ({"words": {"package/de/data.json": b"["}}, "package/de/data.json: not valid JSON"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_tarball_ends_in_one_message_and_writes_nothing(tmp_path, name):
    change, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        emoji_build.build(tmp_path, tmp_path / "set", **tiny(tmp_path, **change))
    assert str(caught.value).count("\n") == 0 and not (tmp_path / "set").exists()


def test_a_tarball_that_is_absent_or_another_is_refused(tmp_path):
    made = tiny(tmp_path)
    file = tmp_path / made["words"].file
    file.write_bytes(file.read_bytes() + b"x")
    with pytest.raises(InputError, match=r"words-1\.tgz: SHA-256 .* Download it again: npm pack words@1\."):
        emoji_build.build(tmp_path, tmp_path / "set", **made)
    file.unlink()
    with pytest.raises(InputError, match=r"words-1\.tgz: does not exist\. .*npm pack words@1\."):
        emoji_build.build(tmp_path, tmp_path / "set", **made)
    made = tiny(tmp_path)
    file.write_bytes(file.read_bytes()[:200])
    made["words"] = Tarball("words", "1", hashlib.sha256(file.read_bytes()).hexdigest())
    with pytest.raises(InputError, match=r"words-1\.tgz: cannot be read"):
        emoji_build.build(tmp_path, tmp_path / "set", **made)
    (tmp_path / "set").mkdir()
    with pytest.raises(InputError, match="exists already"):
        emoji_build.build(tmp_path, tmp_path / "set", **made)
