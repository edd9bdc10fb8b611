"""What a node does with a message, and the app folder; nothing here knows Flower."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any

from filelock import FileLock

from pilot_jax.config import Config, apply_overrides, load_config
from pilot_jax.data.roster import Roster, read_roster
from pilot_jax.errors import InputError
from pilot_jax.federation.executor import Executor, Work
from pilot_jax.federation.parcels import Parcel, packed, unpacked
from pilot_jax.federation.remote import NOT_SENT
from pilot_jax.federation.roles import Tree
from pilot_jax.federation.state import Federation
from pilot_jax.files import atomic_write, new_folder, path_part
from pilot_jax.runs.prepare import configure, deployed_stages, initial_state, prepare
from pilot_jax.storage import read_tree, write_tree
from pilot_jax.words import counted, toml_text, yaml_text

FLOWER = "flwr>=1.42,<1.43"  # its API moves between minor versions; tests/system/test_deployment.py says where to look
OVERRIDES = ("data.", "model.path", "model.parts.", "system.")  # config keys that a node may set for itself


class Node:
    """One client: its data, and its folder, which only one process at a time may use.

    Args:
        fed: a federation of which this client alone has data.
        initial: returns this client's adapters before its first round, which later rounds do not need.
    """

    def __init__(self, fed: Federation, executor: Executor, client: int, folder: Path,
                 initial: Callable[[], dict[str, Tree]], dtype: str) -> None:
        self.fed, self.executor = dataclasses.replace(fed, secret_noise=True), executor
        self.client, self.folder, self.initial, self.dtype = client, folder, initial, dtype

    def start(self, order: Parcel) -> dict[str, Tree]:
        """Returns the adapters with which a phase begins: those of the version that the server names, and its news."""
        version = int(order.about["version"])
        kept = self.read(version)[0] if version else self.initial()
        if strange := set(order.names) - set(self.fed.strategy.traffic(kept)[1]):
            raise InputError(f"the server sent {sorted(strange)[0]}, which is not for it to set.")
        kept = {**kept, **unpacked(order, {name: kept[name] for name in order.names}, self.dtype)}
        return {**kept, **self.fed.strategy.parts_of(kept, self.fed.task_index(self.client))}

    def train(self, order: Parcel) -> Parcel:
        """Returns the upload after a phase. The same question gets the same answer, without training a second time.

        Raises:
            InputError: the node's folder lacks what it needs, or the uploads that privacy allows are used up.
        """
        about, number = order.about, int(order.about["number"])
        digest = hashlib.sha256(repr(sorted(about.items())).encode() + order.data).hexdigest()
        after, note = self.read(number) if self._path(number).exists() else ({}, {})
        if note.get("order") != digest:
            work = Work(self.fed, {self.client: self.start(order)}, about["round"], about["stage"], about["label"])
            trained, = self.executor.train([work])
            after, record = trained.adapters[self.client], trained.records[self.client]
            private = self.fed.noise_multiplier > 0  # losses would tell what the noise hides
            sent = {k: v for k, v in record.items() if k == "fault" or not (k in NOT_SENT or private)}
            self._count_upload(about["stage"])
            note = {"order": digest, "record": sent}
            write_tree(self._path(number), after, note)
        for path in self.folder.glob("[0-9]*.safetensors"):
            if int(path.stem) not in (number, about["version"]):
                path.unlink()
        names = () if "fault" in note["record"] else self.fed.strategy.ownership().uploaded(about["stage"])
        return packed(after, names, self.dtype, note["record"])

    def finish(self, order: Parcel) -> Parcel:
        """Writes the client's final adapters, `final.safetensors`."""
        write_tree(self._path("final"), self.start(order), {})
        return Parcel({})

    def _count_upload(self, stage: str) -> None:
        """Counts an upload before it leaves, so that noise is never drawn more often than ε allows."""
        if self.fed.noise_multiplier and self.fed.strategy.ownership().uploaded(stage):
            file = self.folder / "uploads"
            count = int(file.read_text()) + 1 if file.exists() else 1
            if count > self.fed.most_uploads:
                raise InputError(f"federation.privacy: upload {count} is one more than the {self.fed.most_uploads} "
                                 f"that its ε is for. {file} counts them; agree on another ε to go on.")
            atomic_write(file, str(count))

    def _path(self, name: int | str) -> Path:
        return self.folder / f"{name:06d}.safetensors" if isinstance(name, int) else self.folder / f"{name}.safetensors"

    def read(self, name: int | str) -> tuple[dict[str, Tree], dict[str, Any]]:
        """Returns (adapters, note) of a file of the folder.

        Raises:
            InputError: there is none of this name.
        """
        if not self._path(name).is_file():
            raise InputError(f"{self._path(name)} does not exist. Is it the folder of this client and this run? Put "
                             "it back, or start another run.")
        return read_tree(self._path(name))


@contextmanager
def node_of(app: Path, node: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[Node]:
    """Yields the node of an app folder, with its state folder locked: `<state>/<client>/<checksum of the config>`.

    Args:
        node: its settings (`--node-config`): client, state, and keys of the config that are its own business.
        run: those of the run, `tool.flwr.app.config`.

    Raises:
        InputError: the settings, the config, the roster or the data are wrong.
    """
    if missing := {"client", "state"} - set(node):
        raise InputError(f"--node-config: no {sorted(missing)[0]}. Give client and state.")
    if strange := [key for key in node if key not in ("client", "state") and not key.startswith(OVERRIDES)]:
        raise InputError(f"--node-config: {strange[0]} is not for a node to set. It takes client, state, and config "
                         f"keys that begin with {', '.join(OVERRIDES)}.")
    agreed = load_config(app / "config.yaml")
    folder = Path(str(node["state"])) / path_part(str(node["client"])) / (
        hashlib.sha256(agreed.to_yaml().encode()).hexdigest()[:12])
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        config = apply_overrides(agreed, [f"{k}={yaml_text(v)}" for k, v in node.items() if k.startswith(OVERRIDES)])
        configure(config)
        setup = prepare(config, roster=read_roster(app / "clients.yaml", str(node["client"])))
        client, executor = setup.federation.names.index(node["client"]), dataclasses.replace(
            setup.executor, client_chunk=1)
        yield Node(setup.federation, executor, client, folder,
                   lambda: initial_state(setup.federation).population[client].adapters, str(run["wire"]))


def write_app(out: Path, config: Config, roster: Roster) -> None:
    """Writes a new folder with the app of a config, which `flwr run` starts.

    Raises:
        InputError: the strategy cannot be deployed.
        OSError: the folder exists, or cannot be written.
    """
    values = {"flower": FLOWER, "clients": counted(len(roster.names), "client"), "first": toml_text(roster.names[0]),
              "name": re.sub("[^a-z0-9]+", "-", out.name.lower()).strip("-") or "federation",
              "stages": ",".join(deployed_stages(config))}
    with new_folder(out) as folder:
        for file in (Path(__file__).parent / "app").iterdir():
            atomic_write(folder / file.stem, Template(file.read_text(encoding="utf-8")).substitute(values))
        atomic_write(folder / "config.yaml", config.to_yaml())
        atomic_write(folder / "clients.yaml", roster.text())
