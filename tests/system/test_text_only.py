"""Tests of federations on a language model alone: FedIT from files to exported adapters, and what is refused."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    DiesAt,
    Killed,
    llava_entry,
    same_run,
    small_config,
    tree_max_difference,
    with_image,
    write,
    write_language_model,
)
from PIL import Image

import pilot_jax
from pilot_jax.config import apply_overrides, load_config, parse_config
from pilot_jax.data.check import check_data
from pilot_jax.errors import InputError
from pilot_jax.federation.observer import RunObserver
from pilot_jax.federation.roles import num_bytes, num_parameters
from pilot_jax.models.checkpoints.tensor_names import base_shapes
from pilot_jax.models.lora import init_lora
from pilot_jax.models.pretrained import read_shapes
from pilot_jax.models.vlm import variables
from pilot_jax.planning.estimate import make_plan
from pilot_jax.planning.lowering import programs
from pilot_jax.planning.ownership import ownership_table
from pilot_jax.runs import prepare
from pilot_jax.runs.export import export_client

SIZES = {"a": 6, "b": 3}
WORDS = ("red", "two", "cat", "many")


def turns(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def entries():
    """Returns LLaVA entries of two clients of different size, with as many test samples; without images."""
    return [llava_entry(id=f"{client}-{split}-{i}", client=client, split=split,
                        conversations=turns(f"what is {i} of {client}?", WORDS[i % 4]))
            for client, size in SIZES.items() for split in ("train", "test") for i in range(size)]


def text_config(folder, **sections):
    base = {"model": {"parts": {"language": str(folder / "llm")}}, "strategy": {"name": "fedavg"},
            "data": {"path": str(folder / "data.json")}, "federation": {"rounds": 2}}
    return small_config(**{name: base.get(name, {}) | sections.get(name, {}) for name in {**base, **sections}})


class Phases(RunObserver):
    """Keeps (uploads by client, adapters of all clients afterwards) of every phase; `keep` sees the uploads."""

    def __init__(self):
        self.uploads, self.phases = {}, []

    def keep(self, client, round_, upload, start):
        self.uploads[client] = upload
        return upload

    def phase_ended(self, state, record, mixing, trained):
        if mixing is not None:
            self.phases.append((self.uploads, [c.adapters for c in state.population]))
            self.uploads = {}


@pytest.fixture(scope="module")
def fedit(tmp_path_factory):
    """Returns (folder, torch model, run, its phases) of a whole federated run on a tiny language model."""
    folder = tmp_path_factory.mktemp("fedit")
    reference = write_language_model(folder / "llm", max_position_embeddings=256)
    write(folder, "data.json", entries())
    phases = Phases()
    run = pilot_jax.simulate(text_config(folder), out=folder / "run", observers=[phases], tamper=phases.keep)
    return folder, reference, run, phases.phases


def test_the_averaged_lora_is_numpys_weighted_mean(fedit):
    _, _, run, phases = fedit
    assert run.federation.names == ("a", "b") and len(phases) == 3  # round 1 has two phases
    weights = np.asarray(list(SIZES.values()), np.float64) / sum(SIZES.values())
    for uploads, population in phases:
        assert all(set(upload) == {"text_adapter"} for upload in uploads.values())
        one, two = (uploads[name]["text_adapter"] for name in SIZES)
        assert tree_max_difference(one, two) > 1e-3
        mean = jax.tree.map(lambda a, b: weights[0] * np.float64(a) + weights[1] * np.float64(b), one, two)
        for adapters in population:
            assert set(adapters) == {"text_adapter"}
            assert tree_max_difference(adapters["text_adapter"], mean) < 1e-7


def test_bytes_are_those_of_lora(fedit):
    folder, _, run, phases = fedit
    text = run.federation.model.config.text
    lora = 4 * sum(text.num_layers * 4 * (d_in + d_out) for d_in, d_out in text.linear_shapes.values())  # rank 4
    assert num_bytes(phases[0][1][0]) == lora
    assert run.summary["bytes_up"] == run.summary["bytes_down"] == len(phases) * len(SIZES) * lora
    plan = make_plan(text_config(folder))
    assert plan["bytes_up"] == {"round_1": 4 * lora, "later_rounds": 2 * lora} == plan["bytes_down"]
    assert plan["image_tokens"] == plan["flops_features"] == 0
    table = {row["subtree"]: (row["scope"], row["plain"], row["bytes"]) for row in ownership_table(text_config(folder))}
    base = num_bytes(run.federation.model.base)
    assert table == {"language_model": ("base", "frozen", base), "text_adapter": ("shared", "trained", lora)}


def test_it_is_restored_and_answers(fedit):
    folder, _, run, _ = fedit
    restored = pilot_jax.restore(folder / "run")
    for one, two in zip(run.population, restored.population, strict=True):
        assert tree_max_difference(one.adapters, two.adapters) == 0
    assert isinstance(pilot_jax.answer(restored, "a", None, "what is 1 of a?"), str)
    Image.new("RGB", (8, 8)).save(folder / "one.png")
    for image, prompt in ((folder / "one.png", "q"), (None, "<image> q")):
        with pytest.raises(InputError, match=r"image: the model is a language model alone, which takes no images"):
            pilot_jax.answer(restored, "a", image, prompt)
    assert {"score_mean", "score_base"} <= run.summary.keys()


def test_a_killed_run_goes_on(fedit, tmp_path):
    folder, *_ = fedit
    with pytest.raises(Killed):
        pilot_jax.simulate(text_config(folder), out=tmp_path / "run", observers=[DiesAt(2, "phase")])
    pilot_jax.simulate(text_config(folder), out=tmp_path / "run", resume=True)
    same_run(folder / "run", tmp_path / "run")


@pytest.mark.long
def test_clients_on_disk_and_step_by_step_give_the_same(fedit, tmp_path):
    folder, _, run, _ = fedit
    on_disk = pilot_jax.simulate(text_config(folder, system={"store": str(tmp_path), "steps_at_once": 1}))
    assert on_disk.summary["adapters_sha256"] == run.summary["adapters_sha256"]


def test_the_export_is_a_lora_that_peft_loads(fedit, tmp_path):
    from peft import PeftModel

    _, reference, run, _ = fedit
    export_client(run, "a", tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "pilot_jax.json", "README.md"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "connector" not in card and "llava" not in card
    ids = np.random.default_rng(0).integers(7, 400, (2, 12))
    model = run.federation.model
    ours = model.module.apply(variables(model.base, run.population[0].adapters), ids, np.ones_like(ids), None,
                              method="logits")
    with torch.no_grad():
        before = reference(input_ids=torch.tensor(ids)).logits.numpy()
        after = PeftModel.from_pretrained(reference, tmp_path / "out")(input_ids=torch.tensor(ids)).logits.numpy()
    assert np.abs(after - before).max() > 1e-2
    np.testing.assert_allclose(ours, after, atol=1e-4)


def whole_models_answer(folder, question):
    """Returns transformers' answer by a stock directory alone: its weights, chat template and generation settings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                           return_dict=True, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    return tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.long
def test_the_shipped_config_from_plan_to_export(call, fedit, tmp_path):
    """The documented commands, one after another, on the tiny model and its data."""
    folder, *_ = fedit
    settings = [f"model.parts.language={folder / 'llm'}", f"data.path={folder / 'data.json'}", "data.partition=given",
                "federation.clients=null", "federation.clients_per_round=null", "federation.rounds=1",
                "data.template=vicuna_short", "eval.max_new_tokens=4", "train.batch_size=4", "model.dtype=float32",
                "model.remat=false"]
    config = [ROOT / "configs" / "text_only.yaml", *(part for s in settings for part in ("--set", s))]
    code, out, err = call("plan", *config)
    assert code == 0 and "2 clients, 1 task, " in out and "for the image" not in out, err
    code, out, err = call("run", *config, "--out", tmp_path / "run")
    assert code == 0, err
    code, out, err = call("evaluate", tmp_path / "run")
    assert code == 0, err
    code, out, err = call("generate", tmp_path / "run", "--client", "a", "--prompt", "what is 1 of a?")
    assert code == 0, err
    code, out, err = call("export", tmp_path / "run", "--client", "a", "--out", tmp_path / "out")
    assert code == 0 and (tmp_path / "out" / "adapter_model.safetensors").is_file(), err
    _, ours, _ = call("generate", tmp_path / "run", "--client", "a", "--prompt", "what is 1 of a?")
    code, out, err = call("export", tmp_path / "run", "--client", "a", "--merged", tmp_path / "merged")
    assert code == 0 and out.startswith("Model of a:"), err
    assert whole_models_answer(tmp_path / "merged", "what is 1 of a?") == ours.strip()
    code, out, err = call("report", tmp_path / "run")
    assert code == 0, err


def test_the_shipped_config_is_planned_without_weights():
    """Vicuna-7B has 6,738,415,616 parameters, and LoRA of rank 16 on its linear layers a quarter of that of rank 64."""
    spec, _ = read_shapes(load_config(ROOT / "configs" / "text_only.yaml").model)
    assert num_parameters(base_shapes(spec)) == 6_738_415_616
    lora = jax.eval_shape(lambda: init_lora.jitted(jax.random.key(0), spec.text, 16))
    assert num_parameters(lora) == 159_907_840 // 4


def test_pilot_is_refused_before_anything_is_loaded(fedit, monkeypatch):
    folder, *_ = fedit
    monkeypatch.setattr(prepare, "load_samples", None)
    pilot = apply_overrides(text_config(folder), ["strategy.name=pilot"])
    message = (r"strategy\.name: pilot trains adapters of images \(task, .*\), but model\.parts is a language model "
               r"alone\. Use a strategy that can train LoRA alone: .*fedavg")
    for action in (prepare.prepare, make_plan, ownership_table):
        with pytest.raises(InputError, match=message):
            action(pilot)


def test_a_sample_with_an_image_is_refused(fedit, tmp_path):
    folder, _, run, _ = fedit
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    path = write(tmp_path, "data.json", [*entries(), with_image("one.png") | {"id": "7", "client": "a"}])
    config = text_config(folder, data={"path": str(path)})
    message = r"data\.json.*image: the model is a language model alone.*Leave samples with images out, or give model"
    for action in (prepare.prepare, make_plan):
        with pytest.raises(InputError, match=message):
            action(config)
    report = check_data(path, config.data, run.federation.model)
    assert len(report.errors) == 1 and "takes no images" in report.errors[0]


@pytest.mark.parametrize("given", ["vision", "projector"])
def test_a_tower_needs_a_projector(given):
    message = rf"{given} is given alone\. Give vision and projector both, or neither"
    with pytest.raises(InputError, match=rf"model\.parts: .*{message}"):
        parse_config({"model": {"parts": {"language": "llm", given: "x"}}})
    vision, projector = ("x", None) if given == "vision" else (None, "x")
    with pytest.raises(InputError, match=message):
        pilot_jax.load_from_parts(vision, "llm", projector)


@pytest.mark.slow
def test_the_programs_can_be_lowered(fedit):
    for program in programs(text_config(fedit[0])).values():
        assert program.lower().as_text()


OTHERS = ("scaffold", "fedprox", "fedadam", "ffa_lora", "fedsa_lora", "feddpa", "local", "centralised", "median",
          "similarity", "ditto", "fedamp", "fedmosaic", "rolora", "fedalt", "fedlease", "split_half")


@pytest.mark.long
@pytest.mark.parametrize("strategy", OTHERS)
def test_a_phase_under_another_strategy(fedit, strategy):
    folder, *_ = fedit
    config = text_config(folder, strategy={"name": strategy}, federation={"rounds": 1}, train={"schedule": "constant"})
    run = pilot_jax.simulate(config)
    names = set(run.population[0].adapters)
    assert "projector" not in names and any(name.startswith("text_adapter") for name in names)


@pytest.mark.long
def test_a_frozen_projector_stays_the_bases():
    """On a vision–language model, the projector is used and neither trained, nor uploaded, nor saved."""
    fixed = ["strategy.name=fedavg", "train.lr_connector=1.0e-30"]  # a step that changes no float32
    trained = apply_overrides(small_config(), fixed)
    frozen = apply_overrides(trained, ["strategy.projector=frozen"])
    setup = prepare.prepare(frozen)
    before = jax.tree.map(np.array, setup.federation.model.base["projector"])
    one, two = pilot_jax.simulate(trained), pilot_jax.simulate(frozen)
    after = two.federation.model.base["projector"]
    assert tree_max_difference(before, after) == 0
    assert tree_max_difference(before, one.population[0].adapters["projector"]) < 1e-6  # the mean rounds
    for with_, without in zip(one.population, two.population, strict=True):
        assert set(without.adapters) == {"text_adapter"}
        assert tree_max_difference(with_.adapters["text_adapter"], without.adapters["text_adapter"]) < 1e-4
    assert one.summary["bytes_up"] - two.summary["bytes_up"] == 18 * num_bytes(before)
    rows = {row["subtree"]: row for row in ownership_table(frozen)}
    assert (rows["projector"]["scope"], rows["projector"]["plain"]) == ("base", "frozen")
