"""Flower's server app of a federation: it sends each client's node its own message, and the rest is `runs.served`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from pilot_jax.config import load_config
from pilot_jax.data.roster import Roster, read_roster
from pilot_jax.deploy.client import from_records, to_records
from pilot_jax.federation.parcels import Parcel
from pilot_jax.runs.served import serve_run


def server_app(folder: Path) -> ServerApp:
    """Returns the server app of an app folder, which `glue.write_app` has written."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        settings, roster = context.run_config, read_roster(folder / "clients.yaml")
        serve_run(load_config(folder / "config.yaml"), roster, str(settings["out"]), Post(
            grid, roster, settings).exchange, str(settings["wire"]), partial(print, flush=True))

    return app


class Post:
    """Knows which node is which client's, and brings messages there and back.

    A client is known by its node's public key or, if the roster has no keys, by the name that its node gives.
    """

    def __init__(self, grid: Grid, roster: Roster, settings: Mapping[str, Any]) -> None:
        self.grid, self.roster, self.settings = grid, roster, settings
        self.keys = {public_key_to_bytes(load_ssh_public_key(m.key.encode())): name  # type: ignore[arg-type]
                     for name, m in roster.members.items() if m.key}
        self.names: dict[int, str] = {}  # of nodes that have told theirs

    def nodes(self) -> dict[str, tuple[int, str]]:
        """Returns the node of each client that is connected: its id, and when it connected. The newest counts."""
        online = sorted(self.grid.get_nodes(), key=lambda node: node.last_activated_at)
        if self.keys:
            found = [(self.keys.get(node.public_key, ""), node) for node in online]
        else:
            new = [Message(RecordDict(), node.node_id, "query.name") for node in online
                   if node.node_id not in self.names]
            for reply in self.grid.send_and_receive(new, timeout=60) if new else ():
                if reply.has_content():
                    self.names[reply.metadata.src_node_id] = str(from_records(reply.content).about["name"])
            found = [(self.names.get(node.node_id, ""), node) for node in online]
        return {name: (node.node_id, node.last_activated_at) for name, node in found if name in self.roster.members}

    def exchange(self, kind: str, names: Sequence[str], make: Callable[[str], Parcel]) -> dict[str, Parcel | str]:
        """Returns each client's reply to a message of its own, or why there is none after `timeout` seconds.

        At most `at-once` messages are under way. A node that was restarted is sent its message again. An error of
        SuperLink, such as a locked database, is logged, and what failed is tried again.
        """
        end = time.monotonic() + float(self.settings["timeout"])
        replies: dict[str, Parcel | str] = {}
        asked: dict[str, str] = {}  # client by message
        sent: dict[str, tuple[int, str]] = {}
        while len(replies) < len(names) and (left := end - time.monotonic()) > 0:
            try:
                for name, node in self.nodes().items():
                    if name in names and name not in replies and sent.get(name) != node and (
                            name in sent or len(set(asked.values())) < self.settings["at-once"]):
                        message = Message(to_records(make(name)), node[0], kind, ttl=left)
                        asked[next(iter(self.grid.push_messages([message])))], sent[name] = name, node
                        del message
                for reply in self.grid.pull_messages(list(asked)) if asked else ():
                    name = asked.pop(reply.metadata.reply_to_message_id, "")
                    if name and reply.has_content():
                        replies[name] = from_records(reply.content)
            except httpx.HTTPError as error:
                logging.getLogger("pilot_jax").warning("SuperLink: %s", error)
            time.sleep(float(self.settings["poll"]))
        return {n: replies.get(n, f"did not arrive within {self.settings['timeout']} s") for n in names}
