"""Tests of the digit scenes, of partitions, and of reading and writing LLaVA files."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from pilot_jax.config import parse_config
from pilot_jax.data.division import partition
from pilot_jax.data.llava.reading import read_samples, write_samples
from pilot_jax.data.llava.sample import Sample
from pilot_jax.embedded import scenarios, scenes, tasks
from pilot_jax.errors import InputError
from pilot_jax.models.checkpoints.processors import load_image_processor, load_tokenizer
from pilot_jax.models.pretrained import model_directory


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(model_directory("embedded"))


def test_tokenizer_round_trips_any_text(tokenizer):
    for text in ("the colour is red", "Ωμέγα 42 🙂", "[0.33, 0.00, 0.67, 0.33]"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_handwriting_pools_partition_all_images():
    pools = [set(scenes.pool_indices(p).tolist()) for p in scenes.POOLS]
    assert sum(map(len, pools)) == len(set().union(*pools)) == 1797


def test_scenes_say_what_they_show():
    """Boxes hold ink, boxes lie in their digits' cells, and no two digits of a scene have the same value or ink."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = scenes.draw_scene(rng, "test", scenarios.client_style(1))
        pixels = np.asarray(scene.image, np.float32)
        paper = np.asarray(scenarios.client_style(1).paper)
        assert len({d.value for d in scene.digits}) == len({d.ink for d in scene.digits}) == len(scene.digits)
        assert [d.cell for d in scene.digits] == sorted(d.cell for d in scene.digits)
        for digit in scene.digits:
            x0, y0, x1, y1 = (round(v * scenes.CANVAS) for v in digit.box)
            assert np.abs(pixels[y0:y1, x0:x1] - paper).max() > 60
            assert divmod(digit.cell, 3) == (y0 // 16, x0 // 16)


def test_client_draws_depend_on_no_other_client():
    specs = scenarios.scenario_clients("a", 3, 1, 1)
    everyone = {s.id: s for s in scenarios.scene_samples(specs, 0)}
    alone = list(scenarios.scene_samples([specs[4]], 0))
    for sample in alone:
        assert everyone[sample.id].turns == sample.turns
        np.testing.assert_array_equal(np.asarray(everyone[sample.id].image), np.asarray(sample.image))


def test_scenario_b_is_uneven_and_has_four_tasks():
    specs = scenarios.scenario_clients("b", 40, 2, 2)
    assert len(specs) == 20 and {s.task for s in specs} == {"vqa", "ocr", "caption", "grounding"}
    assert sorted({s.sizes["train"] for s in specs}) == [10, 18, 25, 32, 40]


def test_looks_and_wordings_of_scenario_c():
    def styles(look, wording):
        return {s.name: s.style for s in scenarios.clients_of("c", (4, 1, 1), look=look, wording=wording)}

    def look(style):
        return dataclasses.replace(style, wording=0, own_wording=1.0)

    one = styles("same", "known")
    assert len(one) == 12 and len(set(one.values())) == 1 and one["vqa_0"].wording in tasks.BASE_WORDINGS
    other = styles("own", "known")
    assert len({look(s) for s in other.values()}) == 3 and other["vqa_1"] == other["ocr_1"]
    assert {s.wording for s in styles("same", "shared").values()} == {0}
    assert [styles("same", "own")[f"vqa_{k}"].wording for k in range(3)] == [0, 1, 2]
    half = styles("same", "half")
    assert len({s.wording for s in half.values()}) == 3 and 0 not in {s.wording for s in half.values()}
    assert {s.own_wording for s in half.values()} == {0.5}
    # No client's wording is one that the instructed base has learnt, unless it is to be known.
    assert not {s.wording for s in [*half.values(), *styles("own", "own").values()]} & set(tasks.BASE_WORDINGS)


def test_clients_with_digits_of_their_own_are_tested_on_the_same():
    """In training, nine in ten draws are the client's own digits; in testing, all digits, alike for all clients."""
    specs = scenarios.clients_of("c", (200, 1, 100), look="same", wording="known", labels="own")
    drawn = {(s.client, s.split, s.id): s for s in scenarios.scene_samples([s for s in specs if s.task == "ocr"], 0)}
    for number in range(3):
        read = {split: [int(c) for (client, where, _), s in drawn.items() if (client, where) == (f"ocr_{number}", split)
                        for c in s.turns[1][1] if c.isdigit()] for split in ("train", "test")}
        own = {split: np.mean([value % 3 == number for value in read[split]]) for split in read}
        assert 0.75 < own["train"] < 0.95 and 0.2 < own["test"] < 0.5 and set(read["test"]) == set(range(10))
    tests = [[(s.turns, np.asarray(s.image).tobytes()) for (client, split, _), s in drawn.items()
              if (client, split) == (f"ocr_{number}", "test")] for number in range(3)]
    assert tests[0] == tests[1] == tests[2]


def test_no_more_clients_than_digits_have_digits_of_their_own():
    keys = {"scenario": "c", "labels": "own", "clients_per_task": 11}
    with pytest.raises(InputError, match="clients_per_task may be 10 at most"):
        parse_config({"data": {"digits": keys}})


@pytest.mark.parametrize(("keys", "wrong"), [
    ({"look": "same"}, "look"), ({"labels": "own"}, "labels"), ({"scenario": "b", "wording": "half"}, "wording"),
    ({"scenario": "c", "heterogeneity": 0.5}, "heterogeneity")])
def test_keys_of_another_scenario_are_refused(keys, wrong):
    with pytest.raises(InputError, match=rf"data\.digits: .*{wrong} has no effect in scenario"):
        parse_config({"data": {"digits": keys}})
    parse_config({"data": {"digits": parse_config({}).data.digits.model_dump() | {"scenario": "c"}}})  # all defaults


@pytest.mark.parametrize("task", sorted(set(tasks.TASKS) - {"grounding"}))
def test_the_ten_wordings_of_a_task_differ(task):
    """In their question and in the form of their answer, for one scene and one random number."""
    scene = scenes.draw_scene(np.random.default_rng(3), "train", None)
    texts = [tasks.TASKS[task](np.random.default_rng(5), scene, w) for w in range(10)]
    assert len({question for question, _ in texts}) == len({answer for _, answer in texts}) == 10


def test_a_mirrored_scene_has_mirrored_handwriting():
    plain, mirrored = (scenes.draw_scene(np.random.default_rng(1), "train", scenes.Style(mirrored=m, noise=0.0), most=1)
                       for m in (False, True))
    row, column = divmod(plain.digits[0].cell, 3)
    one, other = (np.asarray(s.image)[row * 16:row * 16 + 16, column * 16:column * 16 + 16] for s in (plain, mirrored))
    np.testing.assert_array_equal(one[:, ::-1], other)
    assert not np.array_equal(one, other)


def test_written_scenes_read_back(tmp_path):
    samples = list(scenarios.scene_samples(scenarios.scenario_clients("a", 2, 1, 1), 0))
    assert write_samples(samples, tmp_path / "scenes") == len(samples) == 36
    back = read_samples(tmp_path / "scenes")
    for a, b in zip(samples, back, strict=True):
        assert (a.id, a.turns, a.task, a.client, a.split) == (b.id, b.turns, b.task, b.client, b.split)
    with Image.open(back[5].image) as image:
        np.testing.assert_array_equal(np.asarray(samples[5].image), np.asarray(image))
    with pytest.raises(InputError, match="exists already"):
        write_samples(samples, tmp_path / "scenes")


def test_pretraining_pixels_are_the_processors():
    from pilot_jax.embedded.pretrain import _pixels

    scene = scenes.draw_scene(np.random.default_rng(0), "pretrain", None)
    processor = load_image_processor(model_directory("embedded"), "clip")
    expected = processor(images=[scene.image], return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    np.testing.assert_allclose(_pixels([scene])[0], expected, atol=1e-5)


def plain_samples(count):
    return [Sample(str(i), None, (("human", "q"), ("gpt", "a")), ("x", "y")[i % 2], "", "train", f"f[{i}]")
            for i in range(count)]


@pytest.mark.parametrize("how", ["equal", "dirichlet"])
def test_partition_deals_every_sample_once(how):
    out = partition(plain_samples(40), how, 6, 0.5, 0)
    assert sorted(s.id for s in out) == sorted(str(i) for i in range(40))
    sizes = {c: sum(s.client == c for s in out) for c in {s.client for s in out}}
    assert len(sizes) == 6 and min(sizes.values()) >= 1
    if how == "equal":
        assert max(sizes.values()) - min(sizes.values()) <= 2
    with pytest.raises(InputError, match="multiple of the number of tasks, 2"):
        partition(plain_samples(40), how, 5, 0.5, 0)


@pytest.mark.parametrize(("entry", "message"), [
    ({"conversations": []}, "conversations"),
    ({"conversations": [{"from": "gpt", "value": "x"}]}, "expected 'human'"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "must be an answer"),
    ({"image": "../a.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]},
     "inside data.image_root"),
    ({"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]},
     "does not exist"),
    ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}, "has no image"),
    ({"split": "dev", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "x"}]}, "split"),
])
def test_bad_entries_name_file_entry_and_key(tmp_path, entry, message):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps([entry]))
    with pytest.raises(InputError, match=message) as caught:
        read_samples(file)
    assert f"{file}[0]" in str(caught.value)


def test_the_handwriting_is_that_of_scikit_learn():
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = scenes.handwriting()
    np.testing.assert_array_equal(images, data.images / 16)
    np.testing.assert_array_equal(labels, data.target)
