"""Tests of strategies of a user's own, and of the section `strategy`; on the toy where the real model is not needed."""

from __future__ import annotations

import hashlib
import sys
import types
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml
from conftest import small_config
from pydantic import Field
from resuming import Stops

from pilot_jax.config import (
    STRATEGY_PARAMS,
    StrategyParams,
    apply_overrides,
    json_schema,
    known_keys,
    load_config,
    parse_config,
)
from pilot_jax.errors import InputError, Interrupted
from pilot_jax.evaluation.personalised import evaluate
from pilot_jax.federation import mixing
from pilot_jax.federation.strategies import ENTRY_POINTS, STRATEGIES, Strategy, make_strategy, use
from pilot_jax.runs import restore, simulate
from pilot_jax.runs.export import export_client
from pilot_jax.runs.resume import Snapshots
from pilot_jax.testing.toy import (
    toy_federation,
    toy_state,
)


class Halfway(Strategy):
    """Each client receives a mixture of its own upload and the mean; the ownership table is the base class's."""

    one_model = False

    class Params(StrategyParams):
        share: float = Field(0.5, ge=0, le=1, description="halfway: weight of the mean")

    def mix(self, cohort):
        own, mean = mixing.identity(len(cohort)), mixing.mean(cohort.sizes)
        return (1 - self.params.share) * own + self.params.share * mean


MINE = f"{__name__}:Halfway"
MODULE = '''
from pathlib import Path
import jax.numpy as jnp
import pilot_jax
from pilot_jax import mixing

Path(__file__).with_name("imported").touch()


class Ring(pilot_jax.Strategy):
    one_model = False

    def mix(self, cohort):
        own = mixing.identity(len(cohort))
        return (own + jnp.roll(own, 1, axis=1)) / 2


NOTHING = 5
'''


@pytest.fixture
def module(tmp_path, monkeypatch, another_process):
    """Yields "module:Class" of a file in the working directory. Its import creates the file `imported` beside it."""
    name = f"mine_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield f"{name}:Ring"
    sys.modules.pop(name, None)


def files(folder):
    """Returns the hash of each file in a folder, except of the lock."""
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_strategy_of_ones_own_in_a_file_is_found_by_its_name(module, on_toy, another_process):
    """An override or `use` finds it, and the run equals that with the object."""
    with pytest.raises(InputError):
        apply_overrides(on_toy, ["strategy={name: " + module + "}"])  # a whole section may come from a file
    config = apply_overrides(on_toy, [f"strategy.name={module}"])
    assert config.strategy.name == module and Path("imported").exists()
    run = simulate.simulate(config)
    assert run.summary["strategy"] == module and type(run.federation.strategy).__name__ == "Ring"
    another_process()
    assert use(module) == module and use(STRATEGIES[module]) == module
    found = STRATEGIES[module]
    as_object = simulate.simulate(on_toy, strategy=found())
    assert as_object.summary["adapters_sha256"] == run.summary["adapters_sha256"]
    assert run.summary["adapters_sha256"] != simulate.simulate(on_toy).summary["adapters_sha256"]
    for bad, message in ((f"{module}s", "has no Rings"), (module.replace("Ring", "NOTHING"), "not a subclass"),
                         ("no_such_module:Ring", "cannot be imported"), ("fedavgg", "Did you mean 'fedavg'")):
        with pytest.raises(InputError, match=message):
            use(bad)


def test_a_file_alone_imports_nothing(module, on_toy, another_process, tmp_path):
    """A config file or run directory that names a module is refused with one line that says what to do."""
    config = apply_overrides(on_toy, [f"strategy.name={module}"])
    simulate.simulate(config, out=tmp_path / "run")
    another_process()
    sys.modules.pop(module.split(":")[0])
    Path("imported").unlink()
    before = files(tmp_path / "run")
    (tmp_path / "their.yaml").write_text(config.to_yaml())
    attempts = [lambda: load_config(tmp_path / "their.yaml"), lambda: restore.restore(tmp_path / "run"),
                lambda: load_config(tmp_path / "their.yaml", ["federation.rounds=3"]),
                lambda: parse_config({"strategy": {"name": module}}), lambda: make_strategy(module),
                lambda: simulate.simulate(on_toy, out=tmp_path / "run", resume=True)]
    for attempt in attempts:
        with pytest.raises(InputError, match="a file alone imports no code") as error:
            attempt()
        assert f"--strategy {module}" in one_line(error)
    assert not Path("imported").exists() and files(tmp_path / "run") == before
    assert restore.restore(tmp_path / "run", strategy=module).federation.strategy.name == module
    assert Path("imported").exists()


@pytest.mark.parametrize("named", ["class", "object", "name"])
def test_an_interrupted_run_of_ones_own_goes_on_with_it_alone(on_toy, another_process, tmp_path, named):
    """Without the strategy, or with another, the run is refused in one line, and its snapshots stay. With the strategy
    it continues."""
    mine = Halfway(Halfway.Params(share=0.25))
    whole = simulate.simulate(on_toy, strategy=mine)
    with pytest.raises(Interrupted):
        simulate.simulate(on_toy, out=tmp_path / "run", strategy=mine, observers=[Stops(3)])
    assert load_config(tmp_path / "run" / "config.yaml").strategy == mine.params
    before = files(tmp_path / "run")
    assert any("resume/000001/manifest.json" in name for name in before)
    with pytest.raises(InputError, match=r"strategy\.name: '.*Halfway' → 'fedavg'"):  # both known
        simulate.simulate(on_toy, out=tmp_path / "run", resume=True)
    another_process()
    for attempt in (lambda: simulate.simulate(on_toy, out=tmp_path / "run", resume=True),
                    lambda: simulate.simulate(parse_config({}), out=tmp_path / "run", resume=True),
                    lambda: restore.restore(tmp_path / "run")):
        with pytest.raises(InputError, match="--strategy") as error:
            attempt()
        assert MINE in one_line(error)
    with pytest.raises(InputError, match=f"but .* is a run of {MINE}") as error:
        use(Halfway)
        restore.restore(tmp_path / "run", strategy="fedavg")
    one_line(error)
    assert files(tmp_path / "run") == before
    another_process()
    use({"class": Halfway, "object": mine, "name": MINE}[named])
    back = restore.restore(tmp_path / "run", strategy={"class": Halfway, "object": mine, "name": MINE}[named])
    assert type(back.federation.strategy) is Halfway and back.federation.strategy.params.share == 0.25
    config = load_config(tmp_path / "run" / "config.yaml")
    run = simulate.simulate(config, out=tmp_path / "run", resume=True)
    assert run.summary["adapters_sha256"] == whole.summary["adapters_sha256"]
    assert restore.restore(tmp_path / "run", strategy=Halfway).summary["strategy"] == MINE


def test_snapshots_of_another_strategy_are_refused_and_stay(on_toy, tmp_path):
    """A snapshot loaded under the wrong strategy is reported as such, and neither called damaged nor removed."""
    with pytest.raises(Interrupted):
        simulate.simulate(on_toy, out=tmp_path / "run", observers=[Stops(3)])
    folder = tmp_path / "run" / "checkpoints" / "resume"
    before = files(folder)
    told = []
    for name in ("ffa_lora", "scaffold", "feddpa"):
        fed = toy_federation(make_strategy(name))
        with pytest.raises(InputError, match="another strategy"):
            Snapshots(folder, fed.names, fed.strategy.roles()).load(toy_state(fed), None, told.append)
    assert not told and files(folder) == before


@pytest.mark.slow
def test_a_run_of_ones_own_is_evaluated_and_exported(another_process, tmp_path):
    """On the real model, a run restored with its class gives the scores of its summary and can be exported."""
    config = small_config(federation={"local_steps": 1}, data={"digits": {"train": 4}})
    run = simulate.simulate(config, out=tmp_path / "run", strategy=Halfway())
    weights = np.load(tmp_path / "run" / "mixing" / "round_0001_plain2.npz")["weights"]
    np.testing.assert_allclose(weights, np.eye(9) / 2 + 1 / 18, atol=1e-6)
    another_process()
    with pytest.raises(InputError, match=f"--strategy {MINE}"):
        restore.restore(tmp_path / "run")
    back = restore.restore(tmp_path / "run", strategy=Halfway)
    assert type(back.federation.strategy) is Halfway and back.config.strategy.name == MINE
    assert evaluate(back.evaluation, back.population) == run.summary["score_by_client"]
    export_client(back, "vqa_0", tmp_path / "vqa_0")
    assert f"| method | {MINE} |" in (tmp_path / "vqa_0" / "README.md").read_text()
    assert (tmp_path / "vqa_0" / "adapter_model.safetensors").stat().st_size > 0


def test_entry_points_of_installed_packages_are_known(on_toy, another_process, monkeypatch):
    """An installed package was chosen by the user, so config files may name its strategies without `--strategy`."""
    point = types.SimpleNamespace(name="halfway", value=MINE, load=lambda: Halfway)
    wrong = types.SimpleNamespace(name="wrong", value="json:loads", load=lambda: 5)
    groups = {ENTRY_POINTS: [point, wrong]}
    monkeypatch.setattr("importlib.metadata.entry_points", lambda *, group: groups.get(group, []))
    config = parse_config({"strategy": {"name": "halfway", "share": 0.75}})
    assert STRATEGIES["halfway"] is Halfway and config.strategy.share == 0.75
    assert type(make_strategy(config.strategy)) is Halfway and make_strategy(config.strategy).name == "halfway"
    another_process()
    assert type(make_strategy(MINE)) is Halfway  # also by its value
    for bad, message in (("wrong", "not a subclass"), ("halfwayy", "is not a strategy")):
        with pytest.raises(InputError, match=message):
            make_strategy(bad)


# The section `strategy`.


def test_the_section_of_a_strategy_of_ones_own(another_process):
    name = use(Halfway)
    assert parse_config({"strategy": {"name": name, "share": 0.25}}).strategy == Halfway.Params(name=name, share=0.25)
    for section, message in (({"share": 2}, r"strategy\.share: .*less than or equal to 1 \(got 2\)"),
                             ({"share": "much"}, r"strategy\.share: .*valid number"),
                             ({"sahre": 0.5}, r"strategy\.sahre: unknown key\. Did you mean 'strategy\.share'\?")):
        with pytest.raises(InputError, match=message):
            parse_config({"strategy": {"name": name, **section}})
    assert "strategy.share" in known_keys()
    assert apply_overrides(parse_config({}), [f"strategy.name={name}", "strategy.share=1"]).strategy.share == 1
    assert yaml.safe_load(parse_config({"strategy": {"name": name}}).to_yaml())["strategy"] == {
        "name": name, "projector": "trained", "share": 0.5, "combine": "factors", "clip": None,
        "residual_rank": None, "rotation": 1.0}


def test_keys_of_other_strategies_are_checked_and_dropped():
    """One config can have keys of several strategies; a wrong value is refused under each of them."""
    several = {"ata": {"neighbors": 4}, "trim": 0.1, "prox_mu": 0.5, "server": {"momentum": 0.5}}
    for name in STRATEGIES:
        section = parse_config({"strategy": {"name": name, **several}}).strategy
        own = STRATEGY_PARAMS[name].model_fields
        assert type(section) is STRATEGY_PARAMS[name]
        assert set(section.model_dump()) == {"name"} | set(own) and section.name == name
        for key in set(several) & set(own):
            assert getattr(section, key) != own[key].default
        for key, bad in (("ata", {"neighbors": 0}), ("trim", 0.5), ("prox_mu", -1), ("server", {"tau": 0}),
                         ("ata", {"neighbours": 1})):
            with pytest.raises(InputError, match=rf"strategy\.{key}"):
                parse_config({"strategy": {"name": name, key: bad}})
    with pytest.raises(InputError, match=r"strategy\.trimm: unknown key\. Did you mean 'strategy\.trim'\?"):
        parse_config({"strategy": {"name": "fedavg", "trimm": 0.1}})
    for raw, message in ((5, "expected a mapping"), ({"name": 5}, "5 is not a strategy"), ({"name": ["a:b"]}, "is not"),
                         ({"name": "fed_avg"}, "Did you mean 'fedavg'")):
        with pytest.raises(InputError, match=message):
            parse_config({"strategy": raw})


def test_the_json_schema_knows_every_strategys_section(another_process):
    use(Halfway)
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    valid = jsonschema.Draft202012Validator(schema).is_valid
    for name, params in STRATEGY_PARAMS.items():
        section = params(name=name).model_dump(mode="json")
        assert valid({"strategy": section}) and valid({"strategy": {"name": name}}), name
        assert not valid({"strategy": section | {"no_such_key": 1}}), name
    assert valid({}) and valid({"strategy": {"ata": {"neighbors": 1}}})  # Pilot is the default
    assert not valid({"strategy": {"name": "no_such_strategy"}})
    assert not valid({"strategy": {"name": MINE, "share": 2}}) and not valid({"strategy": {"ata": {"neighbors": 0}}})
