"""Flower's client app of a federation: a node's answers to the server's messages, each of which is `glue.Node`'s."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

if TYPE_CHECKING:  # each message has a process of its own, which imports JAX if the message needs it
    from pilot_jax.federation.parcels import Parcel


def to_records(parcel: Parcel) -> RecordDict:
    """Returns a parcel as Flower sends it: one array of bytes and one record, so that little is sent beside numbers."""
    records = RecordDict({"about": ConfigRecord({**parcel.about, "names": list(parcel.names)})})
    if parcel.names:
        records["adapters"] = ArrayRecord({"all": Array("uint8", (len(parcel.data),), "bytes", parcel.data)})
    return records


def from_records(records: RecordDict) -> Parcel:
    """Returns the parcel that `to_records` made into records."""
    from pilot_jax.federation.parcels import Parcel

    about = dict(records.config_records["about"])
    names = tuple(about.pop("names"))  # type: ignore[arg-type]
    return Parcel(about, names, records.array_records["adapters"]["all"].data if names else b"")


def client_app(folder: Path, stages: str) -> ClientApp:
    """Returns the client app of an app folder; `stages`: the strategy's, separated by commas."""
    app = ClientApp()
    for stage in stages.split(","):
        app.train(stage)(lambda message, context: _answered(message, context, folder, "train"))
    app.query("finish")(lambda message, context: _answered(message, context, folder, "finish"))
    app.query("name")(lambda message, context: Message(RecordDict({"about": ConfigRecord(
        {"name": str(context.node_config["client"]), "names": []})}), reply_to=message))
    return app


def _answered(message: Message, context: Context, folder: Path, method: Literal["train", "finish"]) -> Message:
    """Returns a node's reply to a message. Of an error only its kind is sent, because its text may quote the data."""
    from pilot_jax.deploy.glue import node_of
    from pilot_jax.federation.parcels import Parcel

    try:
        with node_of(folder, context.node_config, context.run_config) as node:
            parcel = getattr(node, method)(from_records(message.content))
    except Exception as error:
        logging.getLogger("pilot_jax").exception("the message could not be answered")
        parcel = Parcel({"fault": f"did not come: {type(error).__name__}; see the log of its node"})
    return Message(to_records(parcel), reply_to=message)
