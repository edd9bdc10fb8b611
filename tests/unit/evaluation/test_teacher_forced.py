"""Tests teacher forcing against greedy decoding, token by token, and against NumPy on the logits of whole rows."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import llava_entry, small_config

from pilot_jax.compare import runner, variants
from pilot_jax.data.build import build_prompts, encode_prompts, with_answers
from pilot_jax.data.features import image_features
from pilot_jax.data.llava.sample import Entry, parse_sample
from pilot_jax.embedded.scenarios import pretraining_samples
from pilot_jax.errors import InputError
from pilot_jax.evaluation import personalised
from pilot_jax.evaluation.answers import Examinee
from pilot_jax.evaluation.results import Result, results
from pilot_jax.evaluation.teacher_forced import teacher_forced
from pilot_jax.models.generate import Decoding, generate
from pilot_jax.models.vlm import variables
from pilot_jax.runs import prepare, restore, simulate

FORCED = {"scoring": "teacher_forced"}
SAMPLES = pretraining_samples(20, seed=5)  # brief captions, most of which the embedded base gives exactly


@pytest.fixture(scope="module")
def setup():
    return prepare.prepare(small_config(strategy={"name": "fedavg"}, eval=FORCED))


def prompts_of(setup, samples):
    model, tokenizer, data = setup.federation.model, setup.tokenizer, setup.evaluation.data
    prompts = build_prompts(samples, encode_prompts(model, tokenizer, samples, data),
                            image_features(model, samples, data))
    return with_answers(model, tokenizer, samples, data, prompts)


@pytest.fixture(scope="module")
def prompts(setup):
    return prompts_of(setup, SAMPLES)


@pytest.fixture(scope="module")
def examinees(setup, prompts):
    """The base model with three LoRA; the third is so large that many answers become wrong."""
    start, rng = prepare.initial_adapters(setup.federation), np.random.default_rng(0)
    loras = [jax.tree.map(lambda leaf, scale=scale: leaf + scale * rng.normal(size=leaf.shape).astype(np.float32),
                          start["text_adapter"]) for scale in (0.01, 0.05, 0.1)]
    return [Examinee({**start, "text_adapter": lora}, "plain", 0, "base", prompts) for lora in loras]


@pytest.fixture(scope="module")
def forced(setup, examinees):
    return teacher_forced(setup.federation.model, examinees, width=3, batch_size=8)


def targets(prompts, number):
    """The token ids of the reference of a prompt with one reference, its end included."""
    rows = prompts.answered.rows
    return rows["target_ids"][number][rows["target_weights"][number] > 0]


def test_exact_is_what_greedy_decoding_gives(setup, examinees, prompts, forced):
    model, count = setup.federation.model, len(SAMPLES)
    batch = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask,
             "features": np.asarray(prompts.features), "keys": jax.random.split(jax.random.key(0), count)}
    longest = prompts.answered.rows["target_ids"].shape[1]
    how = Decoding(longest, setup.evaluation.decoder.how.stop_ids)
    tokens = np.asarray(generate(
        model.module, model.base, jax.tree.map(lambda *leaves: jnp.stack(leaves), *[e.adapters for e in examinees]),
        {name: jnp.stack([value] * 3) for name, value in batch.items()}, jnp.zeros(3, jnp.int32), stage="plain",
        how=how))
    references = [targets(prompts, i) for i in range(count)]
    assert all(ids[-1] in how.stop_ids for ids in references)
    decoded = [[bool((row[:len(ids)] == ids).all()) for row, ids in zip(own, references, strict=True)]
               for own in tokens]
    for own, one in zip(decoded, forced, strict=True):
        assert one.exact.tolist() == own
    assert 0.7 < np.mean(decoded[0]) < 1 and 0 < np.mean(decoded[2]) < 0.5  # so both kinds are there
    assert setup.tokenizer.decode(references[0], skip_special_tokens=True).strip() == SAMPLES[0].references[0]


def test_shares_of_right_tokens_are_those_of_numpy(setup, examinees, prompts, forced):
    model, rows, features = setup.federation.model, prompts.answered.rows, jnp.asarray(np.asarray(prompts.features))
    for one, got in zip(examinees, forced, strict=True):
        logits = np.asarray(model.module.apply(
            variables(model.base, one.adapters), rows["input_ids"], rows["attention_mask"], features, method="logits"))
        for i in range(len(SAMPLES)):
            wanted, end = targets(prompts, i), int(rows["attention_mask"][i].sum())
            right = logits[i, end - len(wanted) - 1:end - 1].argmax(-1) == wanted
            assert got.tokens[i] == pytest.approx(right.mean()) and got.exact[i] == right.all()
    [result] = results(model, setup.evaluation.decoder, examinees[2:], {}, 3, "teacher_forced")
    assert result == Result(float(forced[2].exact.mean()), pytest.approx(float(forced[2].tokens.mean())))


def test_results_depend_on_no_other_model_and_no_padding(setup, examinees, forced):
    model, own = setup.federation.model, examinees[2]
    few = dataclasses.replace(own, prompts=own.prompts.first(5))
    longer = {name: np.pad(array, ((0, 0), (0, 8))) for name, array in own.prompts.answered.rows.items()}
    padded = dataclasses.replace(own, prompts=dataclasses.replace(
        own.prompts, answered=dataclasses.replace(own.prompts.answered, rows=longer)))
    alone, = teacher_forced(model, [own], width=1, batch_size=3)
    together = teacher_forced(model, [few, examinees[0], padded], width=2, batch_size=16)
    for got, count, wanted in ((alone, 20, forced[2]), (together[0], 5, forced[2]), (together[1], 20, forced[0]),
                               (together[2], 20, forced[2])):
        np.testing.assert_array_equal(got.exact, wanted.exact[:count])
        np.testing.assert_allclose(got.tokens, wanted.tokens[:count], atol=1e-6)


def test_the_best_of_several_references_counts(setup, examinees, forced):
    """Wrong references change nothing, wherever they stand; equal ones are one row."""
    wrong = "no digits here at all."
    samples = [dataclasses.replace(s, answers=(wrong, s.references[0]) if i % 2 else (s.references[0], wrong, wrong))
               for i, s in enumerate(SAMPLES)]
    several, only_wrong = prompts_of(setup, samples), prompts_of(
        setup, [dataclasses.replace(s, answers=(wrong,)) for s in SAMPLES])
    assert several.answered.prompt.tolist() == np.repeat(np.arange(20), 2).tolist()
    first, = teacher_forced(setup.federation.model, [dataclasses.replace(examinees[0], prompts=several)], 3, 16)
    other, = teacher_forced(setup.federation.model, [dataclasses.replace(examinees[0], prompts=only_wrong)], 3, 16)
    assert first.exact.tolist() == forced[0].exact.tolist() and not other.exact.any()
    np.testing.assert_allclose(first.tokens, np.maximum(forced[0].tokens, other.tokens), atol=1e-6)
    assert 0 < other.tokens.mean() < 0.5
    few = several.first(3)
    assert few.answered.prompt.tolist() == [0, 0, 1, 1, 2, 2] and len(few.answered.rows["input_ids"]) == 6


def test_only_the_last_answer_of_a_conversation_is_a_target(setup):
    (question, answer), end = SAMPLES[0].turns, setup.evaluation.decoder.how.stop_ids[0]
    long = dataclasses.replace(SAMPLES[0], turns=(question, answer, ("human", "and now?"), ("gpt", "a blue 3.")))
    prompts = prompts_of(setup, [long])
    wanted = [*setup.tokenizer(" a blue 3.", add_special_tokens=False)["input_ids"], end]
    assert targets(prompts, 0).tolist() == wanted
    positions = prompts.answered.rows["target_positions"][0, :len(wanted)]
    assert positions[0] == prompts.attention_mask[0].sum() - 1 and (np.diff(positions) == 1).all()


def test_what_it_cannot_score_is_refused(setup):
    with pytest.raises(InputError, match=r"eval.*scoring: teacher_forced.*set temperature to 0"):
        small_config(eval=FORCED | {"temperature": 0.5})
    grounding = small_config(eval=FORCED, data={"digits": {"scenario": "b"}})
    with pytest.raises(InputError, match=r"eval.metrics: grounding has iou, .* Set eval.metrics: \{grounding: exact\}"):
        prepare.prepare(grounding)
    for change, message in (("eval.metrics={vqa: anls}", "eval.metrics: vqa has anls"),
                            ("eval.scoring=generate", "eval.scoring: generate, but the data are prepared for")):
        with pytest.raises(InputError, match=message):
            prepare.with_overrides(setup, [change])
    data = setup.evaluation.data.model_copy(update={"max_length": 50})  # enough for the prompts alone
    short = dataclasses.replace(setup, evaluation=dataclasses.replace(setup.evaluation, data=data))
    with pytest.raises(InputError, match=r"digits:base\[0\]: the prompt and its answer have \d+ tokens"):
        prompts_of(short, SAMPLES)
    plain = dataclasses.replace(prompts_of(setup, SAMPLES[:1]), answered=None)
    with pytest.raises(ValueError, match="have no `answered`"):
        teacher_forced(setup.federation.model, [Examinee({}, "plain", 0, "base", plain)], 1, 1)


def with_kinds(samples):
    return [dataclasses.replace(s, kind=("short", "long")[len(s.references[0]) > 40] if i else "")
            for i, s in enumerate(samples)]


def test_a_sample_may_name_its_kind(tmp_path):
    def kind(**changes):
        return parse_sample(Entry("f.json[0]", llava_entry(**changes), "", "", "test"), tmp_path).kind

    assert kind(kind="count") == "count" and kind() == ""
    with pytest.raises(InputError, match=r"f.json\[0\]: kind: \['count'\] must be a text"):
        kind(kind=["count"])


def test_kinds_of_questions_have_scores_of_their_own(setup, examinees, forced):
    samples = with_kinds(SAMPLES)
    asked = [dataclasses.replace(examinees[2], prompts=prompts_of(setup, samples))]
    decoder = dataclasses.replace(setup.evaluation.decoder, how=Decoding(32, setup.evaluation.decoder.how.stop_ids))
    found = [results(setup.federation.model, decoder, asked, {}, 3, how)[0] for how in ("teacher_forced", "generate")]
    rows = {kind: [i for i, s in enumerate(samples) if s.kind == kind] for kind in ("long", "short")}
    assert found[0].by_kind == {kind: forced[2].exact[own].mean() for kind, own in rows.items()}
    assert found[1].by_kind == found[0].by_kind and found[1].score == found[0].score
    assert found[0].by_kind["long"] != found[0].by_kind["short"] and asked[0].prompts.first(2).kinds == ("", "short")


@pytest.mark.long
def test_runs_and_comparisons_write_token_accuracy_and_kinds(tmp_path, monkeypatch):
    real = prepare.load_samples
    monkeypatch.setattr(prepare, "load_samples", lambda config, given=None: [
        dataclasses.replace(s, kind="even" if i % 2 else "odd") if s.task == "vqa" else s
        for i, s in enumerate(real(config))])
    config = small_config(strategy={"name": "fedavg"}, eval=FORCED | {"every": 1}, data={"digits": {"train": 4}})
    run = simulate.simulate(config, out=tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    shares, names = summary["token_accuracy_by_client"], summary["clients"]
    assert set(shares) == set(names) and all(0 < share < 1 for share in shares.values())
    assert summary["token_accuracy"] == pytest.approx(np.mean(list(shares.values())))
    assert summary["token_accuracy_by_task"]["ocr"] == pytest.approx(np.mean([shares[f"ocr_{k}"] for k in range(3)]))
    by_kind, = summary["score_by_kind"].values()
    assert np.mean(list(by_kind.values())) == pytest.approx(summary["score_by_task"]["vqa"])  # one sample of each kind
    back = restore.restore(tmp_path / "run")
    assert personalised.evaluate(back.evaluation, back.population) == run.summary["score_by_client"]

    out = runner.compare(config, variants.read_variants("fedavg,local"), runner.Options(2), tmp_path / "out", str)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    seeds = results["rows"]["fedavg"]["seeds"]
    assert seeds[0]["token_accuracy_by_client"] == pytest.approx(shares, abs=1e-6)
    assert seeds[0]["score_by_kind"] == summary["score_by_kind"] and seeds[0]["base_captions"] > 0.5
    line = out["variants"][0]["token_accuracy"]
    assert line["score"] == pytest.approx(np.mean([seed["token_accuracy"] for seed in seeds]))
    assert "| own | token accuracy |" in (tmp_path / "out" / "results.md").read_text()
