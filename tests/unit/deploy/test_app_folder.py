"""The app folder that `pilot-jax deploy` writes, the roster of clients, and a node's settings. Needs no Flower."""

import ast
import base64
import shlex
import tomllib

import numpy as np
import pytest
import yaml

from pilot_jax import errors
from pilot_jax.config import load_config
from pilot_jax.data.arrays import ClientData
from pilot_jax.data.roster import Member, Roster, read_roster
from pilot_jax.deploy import glue
from pilot_jax.runs.prepare import prepare
from pilot_jax.runs.roster import roster_here
from tests.conftest import ROOT, small_config


def public_key(content: bytes, kind: bytes = b"ecdsa-sha2-nistp384") -> str:
    """Returns the line of a file `*.pub` of OpenSSH."""
    parts = b"".join(len(part).to_bytes(4, "big") + part for part in (kind, content))
    return f"{kind.decode()} {base64.b64encode(parts).decode()}"


ROSTER = Roster({"b": Member("t1", 3, key=public_key(b"b") + " anna@home"),
                 "a": Member("t0", 2, 64, 8, public_key(b"a"))})


def test_the_folder_is_an_app_of_flower(tmp_path):
    glue.write_app(tmp_path / "My app", small_config(), ROSTER)
    folder = tmp_path / "My app"
    assert {p.name for p in folder.iterdir()} == {"README.md", "client_app.py", "clients.yaml", "config.yaml",
                                                  "pyproject.toml", "server_app.py"}
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["name"] == "my-app" and project["project"]["dependencies"] == [glue.FLOWER]
    for part in project["tool"]["flwr"]["app"]["components"].values():
        module, _, name = part.partition(":")
        assert name in {t.id for node in ast.parse((folder / f"{module}.py").read_text()).body
                        if isinstance(node, ast.Assign) for t in node.targets}
    assert '"stage1,stage2"' in (folder / "client_app.py").read_text()
    assert load_config(folder / "config.yaml") == small_config()
    assert read_roster(folder / "clients.yaml") == ROSTER
    assert "$" not in (folder / "README.md").read_text().replace("$ ", "")
    with pytest.raises(FileExistsError):
        glue.write_app(folder, small_config(), ROSTER)


@pytest.mark.parametrize("name", ["caption_0", "O'Hara", 'the "north" one', "a $HOME `id` \\ $(id)", "x = 1 # y.toml",
                                  "日本"])
def test_any_name_of_a_client_is_read_from_the_commands_as_it_is(tmp_path, name):
    """Flower reads `--node-config` as TOML, a value of which ends at the next quote."""
    glue.write_app(tmp_path / "app", small_config(), Roster({name: Member("t", 3)}))
    tomllib.loads((tmp_path / "app" / "pyproject.toml").read_text())
    command = (tmp_path / "app" / "README.md").read_text().rpartition("--node-config ")[2].partition("```")[0]
    (given,) = shlex.split(command)
    value = given.removeprefix("client=").removesuffix(' state="state" data.path="data.json"')
    assert tomllib.loads(f"client = {value}") == {"client": name}
    assert not set(value[1:-1]) & {'"', "'"}


def test_the_extra_and_the_app_ask_for_the_same_flower():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["deploy"] == [glue.FLOWER]


@pytest.mark.parametrize(("strategy", "federation"), [("centralised", {}), ("pilot", {"finetune_steps": 2})])
def test_what_cannot_be_deployed_is_refused(tmp_path, strategy, federation):
    with pytest.raises(errors.InputError, match=r"cannot be deployed .* Set federation.finetune_steps to null"):
        glue.write_app(tmp_path / "app", small_config(strategy={"name": strategy}, federation=federation), ROSTER)
    assert not (tmp_path / "app").exists()


@pytest.mark.parametrize("text", [
    "a: {task: t, samples: 1, tokens: -8}", "a: {task: t, samples: 1, tokens: many}",
    "", "[]", "a: 3", "a: {task: t}", "a: {task: t, samples: 0}", "a: {task: 1, samples: 2}",
    "a: {task: t, samples: 1, extra: 2}", "a: [", "3: {task: t, samples: 1}",
    "a: {task: t, samples: true}", '"": {task: t, samples: 1}', "a: {task: t, samples: 1}\na: {task: t, samples: 2}",
    '"a\\e[2J": {task: t, samples: 1}', 'a: {task: "t\\n", samples: 1}', f"{'n' * 81}: {{task: t, samples: 1}}",
    "[" * 9999, "a: {task: t, samples: 1, key: 3}", "{[a]: {task: t, samples: 1}}"])
def test_a_wrong_roster_is_refused(tmp_path, text):
    file = tmp_path / "clients.yaml"
    file.write_text(text)
    with pytest.raises(errors.InputError, match=r"clients.yaml: no.* Write for each client"):
        read_roster(file)


@pytest.mark.parametrize(("keys", "why"), [
    ((public_key(b"a"), ""), "2 clients, of which 1 with a key"),
    ((public_key(b"a") + " x@y", public_key(b"a")), "b: key: it is that of a"),
    (("anna.pub", public_key(b"b")), r"a: key: expected the line of a file `\*.pub`"),
    ((f"{public_key(b'a')}\n{public_key(b'c')}", public_key(b"b")), "a: key: expected the line"),
    ((public_key(b"a").replace("p384", "p256"), public_key(b"b")), "a: key: expected the line"),
    ((public_key(b"a" * 99)[:-4], public_key(b"b")), "a: key: expected the line"),
    ((public_key(b"a").split()[1], public_key(b"b")), "a: key: expected the line"),
    (("-----BEGIN OPENSSH PRIVATE KEY-----", public_key(b"b")), "a: key: expected the line")])
def test_keys_with_which_somebody_could_never_take_part_are_refused(tmp_path, keys, why):
    file = tmp_path / "clients.yaml"
    file.write_text(Roster({name: Member("t", 3, key=key) for name, key in zip("ab", keys, strict=True)}).text())
    with pytest.raises(errors.InputError, match=rf"clients.yaml: not a list of clients \({why}"):
        read_roster(file)


def test_others_have_room_but_no_data():
    """On the server all sizes are known; on a node nobody is larger than the node itself, as arrays have that room."""
    own = ClientData("a", "t0", {"input_ids": [[1], [2]]}, {})
    assert [(c.name, c.size) for c in ROSTER.completed([])] == [("a", 2), ("b", 3)]
    here = ROSTER.completed([own])
    assert here[0] is own and here[1].size == 2 and here[1].train["input_ids"].size == 0


def test_a_node_has_the_arrays_of_the_simulator():
    """With the others' lengths in the roster, a client that is alone pads its samples as beside them."""
    config = small_config()
    roster = roster_here(config)
    everyone = prepare(config).federation.clients
    own_lengths = set(roster.lengths.values())
    assert len(own_lengths) > 1 and roster.members[everyone[0].name].samples == everyone[0].size
    differ = 0
    for expected in everyone:
        for members in (roster.members, {n: Member(m.task, m.samples) for n, m in roster.members.items()}):
            fed = prepare(config, roster=Roster(members, expected.name)).federation
            found = fed.clients[fed.names.index(expected.name)].train
            for key in set(expected.train) - {"features"}:
                if members is roster.members:
                    np.testing.assert_array_equal(found[key], expected.train[key])
                differ += found[key].shape != expected.train[key].shape
    assert differ  # without lengths, a client with short samples has shorter arrays


@pytest.mark.parametrize(("node", "why"), [
    ({"state": "s"}, "no client"), ({"client": "a"}, "no state"),
    ({"client": "a", "state": "s", "train.lr_connector": 1}, "train.lr_connector is not for a node to set"),
    ({"client": "z", "state": "s"}, "'z' is not in clients.yaml")])
def test_wrong_settings_of_a_node_are_refused(tmp_path, monkeypatch, node, why):
    monkeypatch.chdir(tmp_path)
    glue.write_app(tmp_path / "app", small_config(), ROSTER)
    with pytest.raises(errors.InputError, match=why), glue.node_of(tmp_path / "app", node, {"wire": "float32"}):
        pass


def test_a_node_with_other_data_than_agreed_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = small_config()
    names = yaml.safe_load(ROSTER.text())
    assert list(names) == ["a", "b"]
    first = Roster({"caption_0": Member("caption", 99)})
    glue.write_app(tmp_path / "app", config, first)
    node = {"client": "caption_0", "state": "s"}
    with pytest.raises(errors.InputError, match=r"has 99 training samples of caption, but data.path has \d+ of"), \
            glue.node_of(tmp_path / "app", node, {"wire": "float32"}):
        pass
